"""Three classes, and pictures of one colour."""

from pathlib import Path

import yaml
from PIL import Image

from dfa.data.sources import (
    ClassSet,
)

CONF = Path(__file__).parents[2] / "conf"
CLASSES = ClassSet.from_mapping(
    {
        "names": ["cat", "dog", "hot dog"],
        "background": ["sky"],
        "templates": ["a {}."],
        "prompts": {"cat": ["cat", "kitty"]},
    }
)


def conf_classes(name):
    return ClassSet.from_mapping(yaml.safe_load((CONF / f"classes_{name}.yaml").read_text()))


def save_image(path, size=(20, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).save(path)
