"""The one composition root: Config -> objects. Only this package and jobs know Config."""

import importlib.metadata
import platform

from dfa.build.data import class_set, index, source
from dfa.build.labelling import (
    checkpoint,
    crf_settings,
    factory_plan,
    follow_plan,
    label_facts,
    label_pass,
    model_pass,
    predict_pass,
    seed_pass,
)
from dfa.build.model import device, encoder, model_description, segmenter, trained_segmenter
from dfa.build.predicting import checkpoint_config, checkpoint_segmenter, load, prediction_input, prediction_output
from dfa.build.training import loop_plan, pseudo_settings, train_step

__all__ = [
    "checkpoint",
    "checkpoint_config",
    "checkpoint_segmenter",
    "class_set",
    "crf_settings",
    "device",
    "encoder",
    "factory_plan",
    "follow_plan",
    "index",
    "label_facts",
    "label_pass",
    "load",
    "loop_plan",
    "model_description",
    "model_pass",
    "predict_pass",
    "prediction_input",
    "prediction_output",
    "pseudo_settings",
    "seed_pass",
    "segmenter",
    "source",
    "train_step",
    "trained_segmenter",
    "versions",
]


def versions() -> dict[str, str]:
    """Python and the packages that decide a result."""
    packages = ("torch", "ray", "deepspeed", "open_clip_torch", "pydensecrf2", "webdataset", "pyarrow", "numpy")
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
