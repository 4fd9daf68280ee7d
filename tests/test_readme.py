"""The README's commands for own images, read from it and run as they stand on a tiny folder of pictures."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image

from dfa import config
from dfa.world.folder import write_voc

ROOT = Path(__file__).parent.parent
# A tiny model and two steps; what the commands themselves say is left as it is.
QUICK = [
    "clip.model=conf/tiny_clip.json",
    "clip.checkpoint=dfa/world/tiny_clip.safetensors",
    "clip.similarity=value",
    "clip.attention_blocks=2",
    "decoder.width=32",
    "decoder.depth=1",
    "decoder.heads=4",
    "crop.size=64",
    "train.steps=2",
    "evaluate.scales=[1.0]",
    "evaluate.flip=false",
    "label.worst=0",
]
# One process and one Ray for all: each command by itself would start its own.
RUN = """
import json, runpy, sys
for command in json.loads(sys.argv[1]):
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
exec(json.loads(sys.stdin.read()))
print(json.dumps({"size": mask.shape, "scores": scores.shape}))
"""


def blocks(title, language=""):
    """The code blocks of a section."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind == language]


def commands(title):
    lines = [shlex.split(line) for block in blocks(title) for line in block.splitlines()]
    return [line[2:] for line in lines if line[:2] == ["python", "-m"]]


def test_the_commands_for_own_images_run_as_they_stand(tmp_path):
    own, use = commands("Your own images"), commands("Use the model")
    assert [command[0] for command in own + use] == [
        f"jobs.{name}" for name in ("shard", "train", "pseudo_label", "predict")
    ]
    (yaml,), (python,) = blocks("Your own images", "yaml"), blocks("Use the model", "python")
    (tmp_path / "my_classes.yaml").write_text(yaml)
    world = write_voc(tmp_path / "world", seed=1, num_train=4, num_val=1)
    rows = ["image,labels"]
    for number, path in enumerate(sorted(Path(world).rglob("*.jpg"))):
        name = f"{'trip/' if number % 2 else ''}{number}.jpg"
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(path.read_bytes())
        rows.append(f"{name},{'cat;bicycle' if number % 2 else 'dog'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    Image.new("RGB", (40, 30), (9, 99, 199)).save(tmp_path / "photo.jpg")

    without_gpu = re.search(r"Without a GPU add `([^`]*)` to each", (ROOT / "README.md").read_text(encoding="utf-8"))
    each = [[*command, *without_gpu[1].split(), *QUICK] for command in own + use]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(each)],
        cwd=tmp_path,
        env=environment,
        input=json.dumps(python),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    sharded, trained, labelled, predicted, used = results
    assert (sharded["num_samples"], trained["step"], labelled["num_images"]) == (5, 2, 5)
    assert sorted(
        path.relative_to(tmp_path).as_posix() for path in (tmp_path / "runs/mine/predict").rglob("*.png")
    ) == [f"runs/mine/predict/photos_png/{name}.png" for name in ("0", "2", "4", "trip/1", "trip/3")]
    assert predicted["num_rejects"] == 0
    assert used == {"size": [30, 40], "scores": [4, 30, 40]}


def test_each_command_for_a_number_of_the_paper_names_a_job_and_settings_that_exist():
    text = (
        (ROOT / "README.md")
        .read_text(encoding="utf-8")
        .partition("\n## The paper's numbers\n")[2]
        .partition("\n## ")[0]
    )
    table = "".join(line for line in text.splitlines(keepends=True) if line.startswith("| "))
    found = [shlex.split(each) for each in re.findall(r"`(jobs\.[^`]*)`", table)]
    assert len(found) >= 15
    for job, conf, *overrides in found:
        assert (ROOT / f"{job.replace('.', '/')}.py").is_file()
        config.load(conf, overrides)
    for override in re.findall(r"`(\w+\.\w+=[^`]*)`", table):
        config.load("voc_dfa", [override])
