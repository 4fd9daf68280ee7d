"""A follower labels with each better checkpoint of a training that runs, is killed, prunes, or is not there at all."""

import json
import logging
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dfa.data.offline import current_generation, resolve
from dfa.label.slots import NothingFreeError
from dfa.train import checkpoint
from dfa.train.checkpoint import CheckpointInfo, copy_model, find_checkpoint, load_weights, save_checkpoint
from dfa.train.follow import FollowPlan, follow
from dfa.train.objective import EngineState

PLANNED = 40


def save(run: Path, step: int, val_miou: float | None = None) -> Path:
    """A checkpoint of ten samples a step, whose one weight is its step."""
    weights, first, second = ({"student.w": torch.full((3,), float(step))} for _ in range(3))
    info = CheckpointInfo(step, 10 * step, 0, val_miou, step, 1.0, ("cat", "dog"), {"clip": {}})
    return Path(save_checkpoint(run, EngineState(weights, first, second, step, 1.0), {}, info))


def plan_of(tmp_path: Path, **changes) -> FollowPlan:
    """A plan whose training is described by the file `planned`, if it is there."""

    def planned() -> int | None:
        return PLANNED if (tmp_path / "run/run.json").exists() else None

    folders = (str(tmp_path / "run"), str(tmp_path / "labels"), str(tmp_path / "run/follow/train"))
    return replace(FollowPlan(*folders, "best", planned, interval_s=0.01, patience_s=0.2), **changes)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    return tmp_path / "run"


class Labeller:
    """Writes what it labelled with into the generation's folder."""

    def __init__(self, plan: FollowPlan, meanwhile=None):
        self.plan, self.meanwhile, self.steps, self.names = plan, meanwhile or (lambda step: None), [], []

    def __call__(self, name: str, folder: str) -> str:
        weights, info = load_weights(find_checkpoint(Path(self.plan.snapshots), name), class_names=("cat", "dog"))
        assert weights["student.w"].tolist() == [info.step] * 3
        Path(folder).mkdir(parents=True)
        Path(f"{folder}_quality").mkdir()
        (Path(folder) / "step").write_text(str(info.step))
        self.steps.append(info.step)
        self.names.append(name)
        self.meanwhile(info.step)
        return name


def test_each_better_checkpoint_is_labelled_with_until_the_trainings_own_plan_is_done(run, tmp_path):
    plan, seen = plan_of(tmp_path), []
    save(run, 1, 0.3)

    def train_on(step):
        seen.append(current_generation(plan.root))
        if step == 1:
            save(run, 2, 0.2)  # worse
            save(run, 3, 0.5)
            checkpoint.prune(run, keep_last=1, newest=3)
        if step == 3:
            save(run, 4, 0.6)

    labeller = Labeller(plan, train_on)
    assert follow(plan, labeller) == labeller.names
    assert labeller.steps == [1, 3, 4]
    assert seen == [None, *labeller.names[:2]]
    assert (Path(resolve(plan.root)) / "step").read_text() == "4"
    # The one before stays, since it may still be read; older ones and their models are gone.
    kept = {path.name for path in Path(plan.root).iterdir()} - {"current.json"}
    assert kept == {f"{name}{end}" for name in labeller.names[1:] for end in ("", "_quality")}
    assert {path.name for path in (Path(plan.snapshots) / "checkpoints").iterdir()} == set(labeller.names[1:])
    assert follow(plan, labeller) == []  # started again, it finds all done


def test_a_kept_model_is_whole_and_has_no_optimizer(run, tmp_path):
    folder = Path(copy_model(save(run, 7), tmp_path / "kept", name="step-00000007-aa"))
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "state.json"]
    assert load_weights(folder, class_names=None)[0]["student.w"].tolist() == [7.0] * 3
    assert [path.name for path in folder.parent.iterdir()] == ["step-00000007-aa"]


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_checkpoint_that_cannot_be_copied_whole_is_not_used_and_the_next_one_is(run, tmp_path, damage, caplog):
    plan, weights = plan_of(tmp_path, which="latest"), save(run, 1) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1]) if damage == "cut" else weights.unlink()
    labeller = Labeller(plan)
    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=follow, args=(plan, labeller))
        thread.start()
        while "looking for another checkpoint" not in caplog.text:
            time.sleep(0.01)
        save(run, 4)
        thread.join(10)
    assert labeller.steps == [4] and "model.safetensors" in caplog.text
    assert [path.name for path in (Path(plan.snapshots) / "checkpoints").iterdir()] == labeller.names


def test_a_damaged_last_checkpoint_ends_it_with_its_name(run, tmp_path):
    weights = save(run, 4) / "model.safetensors"
    weights.write_bytes(b"")
    with pytest.raises(ValueError, match=r"training has ended.*model.safetensors is damaged"):
        follow(plan_of(tmp_path), Labeller(plan_of(tmp_path)))


@pytest.mark.parametrize("has_checkpoints", [False, True])
def test_a_folder_without_a_training_is_refused_after_some_patience(tmp_path, has_checkpoints):
    plan = plan_of(tmp_path)
    if has_checkpoints:
        save(tmp_path / "run", 4)
    begin = time.monotonic()
    words = "has checkpoints but no run.json" if has_checkpoints else "has neither checkpoints nor a run.json"
    with pytest.raises(ValueError, match=rf"{tmp_path}/run {words} after .* give its folder as run="):
        follow(plan, Labeller(plan))
    assert 0.2 <= time.monotonic() - begin < 10
    # No training waits for labels that will never come.
    assert (Path(plan.root) / "current.json").exists() == has_checkpoints


def test_a_training_that_starts_late_is_followed(tmp_path):
    plan = plan_of(tmp_path, patience_s=60.0)
    labeller = Labeller(plan)
    thread = threading.Thread(target=follow, args=(plan, labeller))
    thread.start()
    while not (Path(plan.root) / "current.json").exists():
        time.sleep(0.01)
    assert resolve(plan.root) is None  # the training may be told to read from there
    save(tmp_path / "run", 4)
    (tmp_path / "run/run.json").write_text("{}")
    thread.join(10)
    assert labeller.steps == [4]


def test_a_busy_cluster_is_waited_for_and_said_so(run, tmp_path, caplog):
    plan, tries = plan_of(tmp_path), []
    save(run, 1)
    labeller = Labeller(plan, lambda step: save(run, 4) if step == 1 else None)

    def label(name, folder):
        tries.append(name)
        if len(tries) < 4:
            raise NothingFreeError("labelling needs a free CPU; Ray has 0 CPUs")
        return labeller(name, folder)

    with caplog.at_level(logging.INFO):
        follow(plan, label)
    assert labeller.steps == [1, 4] and tries[:4] == tries[:1] * 4
    assert caplog.text.count("waiting: labelling needs a free CPU") == 1


def test_after_the_training_a_busy_cluster_is_waited_for_with_patience_only(run, tmp_path):
    save(run, 4)

    def label(name, folder):
        raise NothingFreeError("labelling needs a free CPU")

    with pytest.raises(NothingFreeError):
        follow(plan_of(tmp_path), label)


def test_a_new_training_in_the_same_folder_gets_labels_of_its_own(run, tmp_path):
    plan = plan_of(tmp_path)
    save(run, 4, 0.5)
    first = follow(plan, Labeller(plan))
    shutil.rmtree(run / "checkpoints")
    save(run, 4, 0.6)
    second = follow(plan, Labeller(plan))
    assert len({*first, *second}) == 2 and current_generation(plan.root) == second[0]


def test_a_folder_of_labels_is_no_place_for_generations(run, tmp_path):
    plan = plan_of(tmp_path)
    Path(plan.root).mkdir()
    (Path(plan.root) / "index.json").write_text(json.dumps({"kind": "dfa-labels"}))
    with pytest.raises(
        ValueError, match=r"labels is a folder of labels; those of a follower need a folder of their own"
    ):
        follow(plan, Labeller(plan))
