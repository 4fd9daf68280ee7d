"""The README's commands for own images, read from it and run as they stand on a tiny folder of pictures."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dfa import build
from dfa.config import class_set, load
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
    "evaluate.input_size=112",
    "evaluate.flip=false",
    "label.worst=0",
    "label.scorers=1",
]
# One process and one Ray for all: each command by itself would start its own.
# It leaves without the C++ libraries' own end, in which Ray 2.60 now and then crashes: a thread of its metrics logs that they could
# not be exported when the logger is gone.
RUN = """
import json, os, runpy, sys
for command in json.loads(sys.argv[1]):
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
exec(json.loads(sys.stdin.read()))
print(json.dumps({"size": mask.shape, "scores": scores.shape}), flush=True)
import ray
ray.shutdown()
sys.stderr.flush()
os._exit(0)
"""


def blocks(title, language=""):
    """The code blocks of a section."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind == language]


def commands(title):
    lines = [shlex.split(line) for block in blocks(title) for line in block.splitlines()]
    return [line[2:] for line in lines if line[:2] == ["python", "-m"]]


@pytest.mark.runs
def test_the_commands_for_own_images_run_as_they_stand(tmp_path, monkeypatch):
    own, use = commands("Your own images"), commands("Use the model")
    first, shard, train, label, example = own
    names = ("demo", "shard", "train", "pseudo_label", "shard", "predict")
    assert [command[0] for command in own + use] == [f"jobs.{name}" for name in names]
    (yaml,), (python,) = blocks("Your own images", "yaml"), blocks("Use the model", "python")
    (tmp_path / "my_classes.yaml").write_text(yaml)
    world = write_voc(tmp_path / "world", seed=1, num_train=4, num_val=1)
    voc = tmp_path / "voc_mini/VOCdevkit/VOC2012/JPEGImages"
    voc.mkdir(parents=True)
    rows = []
    for number, path in enumerate(sorted(Path(world).rglob("*.jpg"))):
        for copy in (tmp_path / f"photos/{('cat', 'dog')[number % 2]}/{number}.jpg", voc / f"{number}.jpg"):
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
        rows.append(f"{number} {'kite train' if number % 2 else 'shell'}")
    (tmp_path / "voc_mini/image_labels.txt").write_text("\n".join(rows) + "\n")
    (sed,) = (line for block in blocks("Your own images") for line in block.splitlines() if line.startswith("sed "))
    subprocess.run(["bash", "-c", sed], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    samples = build.source(load(example[1], example[2:]))  # what its command would write
    assert build.source_classes(load(example[1], example[2:])).names == ("kite", "shell", "train")
    assert [sample.labels for sample in samples] == [(2,), (1, 3), (2,), (1, 3), (2,)]
    Image.new("RGB", (40, 30), (9, 99, 199)).save(tmp_path / "photo.jpg")

    without_gpu = re.search(r"Without a GPU add `([^`]*)` to each", (ROOT / "README.md").read_text(encoding="utf-8"))
    each = [[*command, *without_gpu[1].split(), *QUICK] for command in (first, shard, train, label, *use)]
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
    looked, sharded, trained, labelled, predicted, used = results
    assert looked["images_per_class"] == sharded["images_per_class"] == {"cat": 3, "dog": 2}
    assert len(list(Path(looked["masks"]).glob("*.png"))) == 5 and looked["steps"] == 2
    assert Path(looked["classes"]).is_file()
    assert (trained["step"], labelled["num_images"]) == (2, 5)
    pngs = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "runs/mine/predict").rglob("*.png")}
    names = ("cat/0", "cat/2", "cat/4", "dog/1", "dog/3")
    assert pngs == {f"runs/mine/predict/photos_png/{name}.png" for name in names}
    assert predicted["num_rejects"] == 0
    assert used == {"size": [30, 40], "scores": [3, 30, 40]}
    assert class_set(str(tmp_path / "my_classes.yaml")).names == ("cat", "dog", "bicycle")


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
        load(conf, overrides)
    for override in re.findall(r"`(\w+\.\w+=[^`]*)`", table):
        load("voc_dfa", [override])
