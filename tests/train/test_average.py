"""The moving average of the weights, against a slow float64 recursion, and what a checkpoint keeps of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dfa.data.shards import ShardIndex
from dfa.data.stream import Batch
from dfa.train.average import WeightAverage
from dfa.train.checkpoint import (
    CheckpointInfo,
    CorruptCheckpointError,
    copy_model,
    latest_checkpoint,
    load_weights,
    save_checkpoint,
    uses_average,
)
from dfa.train.objective import EngineState
from dfa.train.progress import Progress
from dfa.train.stop import STOP_NAME
from dfa.train.worker import Trainer
from tests.train import engines
from tests.train.engines import CPU, build
from tests.train.local_run import stopping_after, train
from tests.train.toy import ToyObjective, local_batches, toy_plan

NAMES = ("cat", "dog")


def average_of(run: Path, names=("cat", "dog", "owl")) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(run, class_names=names)
    assert checkpoint is not None and checkpoint.average is not None
    return checkpoint.average


def test_it_equals_the_slow_recursion_in_float64() -> None:
    torch.manual_seed(0)
    objective = ToyObjective(3)
    average, decay = WeightAverage(objective, 0.7), 0.7
    slow = {name: value.detach().double() for name, value in objective.named_parameters()}
    for number in range(1, 40):
        for value in objective.parameters():
            value.data += torch.randn_like(value)
        average.update(number)
        kept = min(decay, (1 + number) / (10 + number))
        slow = {
            name: kept * slow[name] + (1 - kept) * value.detach().double()
            for name, value in objective.named_parameters()
        }
    for name, value in average.state().items():
        # Forty roundings of 2^-24 of values up to ten.
        torch.testing.assert_close(value.double(), slow[name], atol=1e-5, rtol=0)


def test_while_it_is_used_the_objective_has_it_and_its_own_weights_afterwards_to_the_bit() -> None:
    torch.manual_seed(0)
    objective = ToyObjective(3)
    average = WeightAverage(objective, 0.9)
    for value in objective.parameters():
        value.data += 1
    average.update(1)
    own = {name: value.detach().clone() for name, value in objective.named_parameters()}
    with pytest.raises(OSError), average.used():
        assert all(torch.equal(value, average.state()[name]) for name, value in objective.named_parameters())
        assert not torch.equal(objective.unused, own["unused"])
        raise OSError("validation failed")
    assert all(torch.equal(value, own[name]) for name, value in objective.named_parameters())


def _averaged(engine: Any) -> dict[str, torch.Tensor]:
    average = WeightAverage(engine.objective, 0.9)
    for step in range(3):
        engines.train(engine, range(step, step + 1))
        average.update(step + 1)
    return average.state()


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(_averaged(build("deepspeed", stage=2)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_every_rank_has_the_same_average_as_one_process_whatever_shards_the_optimizer(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = _averaged(build("torch"))
    for name, value in alone.items():
        assert torch.equal(first[name], second[name])
        # The weights themselves agree no better: gradients are summed in another order.
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_stopped_and_resumed_run_has_the_average_of_an_uninterrupted_one(
    tmp_path: Path,
    index: ShardIndex,
    engine: str,
) -> None:
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    settings: dict[str, Any] = {"engine": engine, "average_decay": 0.8}
    whole, parts = (toy_plan(tmp_path / name, index, **settings) for name in ("whole", "parts"))
    train(whole, index)
    batches = local_batches(parts, index, Progress(parts.shard_sizes))
    assert train(parts, index, stopping_after(batches, tmp_path / "parts", 11))["interrupted"]
    (tmp_path / "parts" / STOP_NAME).unlink()
    train(parts, index)
    found, wanted = average_of(tmp_path / "parts"), average_of(tmp_path / "whole")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    checkpoint = latest_checkpoint(tmp_path / "whole", class_names=whole.class_names)
    assert checkpoint is not None
    assert not torch.equal(checkpoint.engine.weights["head.weight"], wanted["head.weight"])


class Watched(ToyObjective):
    """Remembers what it was validated with."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.validated: list[torch.Tensor] = []

    def validate(self, batch: Batch) -> torch.Tensor:
        self.validated.append(self.head.weight.detach().clone())
        return super().validate(batch)


def test_validation_sees_the_average_and_training_goes_on_from_its_own_weights(
    tmp_path: Path,
    index: ShardIndex,
) -> None:
    without, kept = (
        toy_plan(tmp_path / name, index, engine="torch", average_decay=decay, make_objective=lambda _: Watched(3))
        for name, decay in (("without", 0.0), ("kept", 0.9))
    )
    train(without, index)
    trainer = Trainer(kept, device=CPU, checkpoint=None)
    trainer.train(local_batches(kept, index, Progress(kept.shard_sizes)), report=lambda _: None)
    validated: Any = trainer.engine.objective.validated
    assert torch.equal(validated[-1], average_of(tmp_path / "kept")["head.weight"])
    ends = [latest_checkpoint(tmp_path / name, class_names=kept.class_names) for name in ("without", "kept")]
    assert ends[0] is not None and ends[1] is not None
    for name, value in ends[0].engine.weights.items():
        assert torch.equal(ends[1].engine.weights[name], value)


def test_an_average_that_begins_later_begins_with_the_weights_and_says_so(
    tmp_path: Path,
    index: ShardIndex,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = toy_plan(tmp_path, index, engine="torch")
    train(plan, index)
    checkpoint = latest_checkpoint(tmp_path, class_names=plan.class_names)
    assert checkpoint is not None and checkpoint.average is None
    trainer = Trainer(replace(plan, average_decay=0.9), device=CPU, checkpoint=checkpoint)
    assert "holds no averaged weights: the average begins with its weights" in caplog.text
    assert trainer._average is not None
    assert torch.equal(trainer._average.state()["head.weight"], checkpoint.engine.weights["head.weight"])


def save(run: Path, average: dict[str, torch.Tensor] | None) -> Path:
    weights = {"student.w": torch.full((3,), 1.0), "student.count": torch.tensor([4])}
    info = CheckpointInfo(7, 0, 0, None, 0, 1.0, NAMES, {})
    return Path(save_checkpoint(run, EngineState(weights, {}, {}, 0, 1.0), {}, info, average))


def test_a_checkpoint_gives_the_weights_that_are_asked_for(tmp_path: Path) -> None:
    folder = save(tmp_path / "with", {"student.w": torch.full((3,), 2.0)})
    plain = save(tmp_path / "without", None)
    for kind, value in (("auto", 2.0), ("average", 2.0), ("trained", 1.0)):
        weights, _ = load_weights(folder, class_names=NAMES, kind=kind)  # type: ignore[arg-type]
        assert weights["student.w"].tolist() == [value] * 3
        assert weights["student.count"].tolist() == [4]  # what is not trained is no average's
    assert load_weights(plain, class_names=NAMES, kind="auto")[0]["student.w"].tolist() == [1.0] * 3
    assert (uses_average(folder, "auto"), uses_average(plain, "auto")) == (True, False)
    with pytest.raises(ValueError, match=r"has no averaged weights: train with train\.ema_decay"):
        load_weights(plain, class_names=NAMES, kind="average")


def test_a_copied_model_keeps_its_average_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", {"student.w": torch.full((3,), 2.0)})
    copied = copy_model(folder, tmp_path / "kept", name="step-00000007-aa")
    assert load_weights(copied, class_names=NAMES, kind="average")[0]["student.w"].tolist() == [2.0] * 3
    (folder / "average.safetensors").write_bytes(b"damaged")
    for read in (
        lambda: load_weights(folder, class_names=NAMES, kind="auto"),
        lambda: copy_model(folder, tmp_path / "kept", name="step-00000007-bb"),
    ):
        with pytest.raises(CorruptCheckpointError, match=r"average\.safetensors is damaged"):
            read()
    assert load_weights(folder, class_names=NAMES)[0]["student.w"].tolist() == [1.0] * 3


def test_impossible_decays_are_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        WeightAverage(ToyObjective(3), 1.0)
