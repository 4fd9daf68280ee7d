"""What jobs/train keeps of each start, and what it refuses; the run is complete, so nothing is trained."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dfa import build
from dfa.config import load
from dfa.data.lock import alone_in
from dfa.train.checkpoint import CheckpointInfo, save_checkpoint
from dfa.train.objective import EngineState
from dfa.train.progress import Progress
from dfa.train.starts import read_starts
from dfa.world.folder import write_voc
from jobs import train
from tests.small_runs import write_shards


@pytest.fixture
def config(tmp_path):
    """A run of three steps that has a checkpoint of its last one."""
    config = load("demo", [f"run={tmp_path}/run", f"shards.train={tmp_path}/train", "train.steps=3"])
    config.data.root = str(write_voc(tmp_path / "world", seed=1, num_train=6, num_val=4))
    write_shards(config, config.shards.train)
    num_samples = config.train.steps * config.train.batch_size
    progress = Progress([shard.num_samples for shard in build.index(config, "train").shards])
    model, names = build.model_description(config), build.class_set(config).names
    info = CheckpointInfo(3, num_samples, 0, None, 3, 1.0, names, model)
    save_checkpoint(config.run, EngineState({}, {}, {}, 3, 1.0), progress.to_tensors(), info)
    return config


def test_the_run_folder_says_what_made_it_and_how_each_start_differs(config, caplog):
    assert train.work(config)["steps_made"] == 0
    record = json.loads((Path(config.run) / "run.json").read_text())
    assert record["config"]["train"]["steps"] == 3 and record["versions"]["torch"] and record["machine"]["cpus"] >= 1
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(train.__file__).parent, capture_output=True, text=True)
    assert record["code"]["commit"] == (head.stdout.strip() if head.returncode == 0 else None)
    assert not caplog.text.count("differs")
    config.train.log_every = 7
    train.work(config)
    assert "this start differs from the one before in config.train.log_every: 10 -> 7" in caplog.text
    first, second = read_starts(config.run, "job")
    assert first["changed"] == {} and second["changed"] == {"config.train.log_every": [10, 7]}
    assert first["hash"] != second["hash"] and second["host"] == record["machine"]["host"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["clip.checkpoint=missing.pt"], r"missing\.pt"),
        (["clip.model=ViT-B-16", "clip.checkpoint=openai"], "trained with QuickGELU"),
        (["method=ffr", "ffr.block=9"], r"ffr\.block is 9, allowed is 0 to 5"),
    ],
)
def test_what_every_worker_would_refuse_is_told_before_any_is_started(config, overrides, message):
    other = load("demo", [f"run={config.run}-other", f"shards.train={config.shards.train}", *overrides])
    with pytest.raises(ValueError, match=message):
        train.work(other)
    assert read_starts(other.run, "workers") == []


def test_a_run_is_not_continued_on_other_shards(config, tmp_path):
    train.work(config)
    config.shards.train = str(tmp_path / "others")
    write_shards(config, config.shards.train, seed=1)
    with pytest.raises(
        ValueError, match=r"was trained on other shards than shards\.train=.*others.*another run folder"
    ):
        train.work(config)
    assert len(read_starts(config.run, "job")) == 1


def test_mlflow_is_asked_for_before_anything_starts(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    for name in [name for name in sys.modules if name.startswith("mlflow.")]:
        monkeypatch.delitem(sys.modules, name)
    config.train.mlflow = "http://127.0.0.1:1"
    with pytest.raises(ValueError, match="pip install mlflow-skinny"):
        train.work(config)


def test_a_class_list_without_background_texts_is_told(config, tmp_path, caplog):
    train.work(config)
    assert "no background texts" not in caplog.text
    listed = build.class_set(config).to_mapping() | {"background": []}
    config.data.classes = str(tmp_path / "classes.yaml")
    Path(config.data.classes).write_text(yaml.safe_dump(listed))
    train.work(config)
    assert "has no background texts: every pixel must be one of its classes" in caplog.text


def test_a_run_in_which_something_trains_is_left_alone(config, monkeypatch):
    monkeypatch.setattr(train, "_PATIENCE_S", 0.0)
    before = sorted(Path(config.run).iterdir())
    with (
        alone_in(config.run, busy=""),
        pytest.raises(ValueError, match=rf"something else trains in {config.run}.*run="),
    ):
        train.work(config)
    assert sorted(Path(config.run).iterdir()) == before
