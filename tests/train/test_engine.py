"""Both engines make the same updates, at every sharding, and their states are interchangeable."""

import functools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dfa.train.adam import LossScale
from dfa.train.engine import make_engine
from dfa.train.objective import EngineState, LossPart, NonFiniteLossError, global_loss, learning_rate_factor
from tests.train.engines import CPU, GLOBAL_BATCH, build, train
from tests.train.toy import SETTINGS, ToyObjective, toy_batch

ROOT = Path(__file__).parents[2]
# fp32 sums in another order (ranks, micro-batches, partitions): a few units in the last place per step
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def assert_same(a: EngineState, b: EngineState, **tolerance: float) -> None:
    assert a.num_updates == b.num_updates
    for left, right in ((a.weights, b.weights), (a.moment1, b.moment1), (a.moment2, b.moment2)):
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(
                left[name], right[name], **(tolerance or TOLERANCE), msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.fixture(scope="module")
def reference() -> tuple[EngineState, list[float]]:
    engine = build("torch")
    norms = train(engine, range(6))
    return engine.state(), norms


def oracle_weights() -> dict[str, torch.Tensor]:
    """The same six steps by torch's own AdamW on the loss written out."""
    torch.manual_seed(0)
    model = ToyObjective(3)
    groups = [
        {"params": list(g.parameters), "weight_decay": g.weight_decay, "lr": g.learning_rate_scale}
        for g in model.parameter_groups()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-4)
    for step in range(6):
        factor = min(1, (step + 1) / 3) * (1 - step / 100)
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 1e-2 * factor, 1e-1 * factor
        parts = model(toy_batch(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)))
        model.zero_grad()
        sum(p.weight * p.total / p.count for p in parts).backward()
        model.unused.grad = torch.zeros(3)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model.state_dict()


def test_torch_engine_makes_the_updates_of_plain_adamw(reference: Any) -> None:
    for name, want in oracle_weights().items():
        torch.testing.assert_close(reference[0].weights[name], want, **TOLERANCE)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_makes_the_same_updates_as_torch(reference: Any, stage: int) -> None:
    pytest.importorskip("deepspeed")
    engine = build("deepspeed", stage=stage)
    norms = train(engine, range(6))
    assert norms == pytest.approx(reference[1], rel=1e-5)
    assert_same(engine.state(), reference[0])


@pytest.mark.long
@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_a_worker_imports_neither_the_compiler_nor_mlflow(kind: str) -> None:
    pytest.importorskip("deepspeed")
    lines = (
        "import sys",
        "from tests.train.engines import build, train",
        f"engine = build({kind!r})",
        "train(engine, range(2))",
        "engine.load(engine.state())",
        "train(engine, range(2, 4))",
        "print(sorted({'mlflow', 'torch._dynamo', 'torch._inductor'} & sys.modules.keys()))",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr


def test_a_state_continues_on_any_engine_and_stage(reference: Any) -> None:
    pytest.importorskip("deepspeed")
    sources = [("torch", 0), ("deepspeed", 1), ("deepspeed", 0), ("deepspeed", 2)]
    state = None
    for i, (kind, stage) in enumerate(sources):
        engine = build(kind, stage=stage)
        torch.nn.init.zeros_(engine.objective.body.weight)  # what is loaded must not come from the seed
        if state is not None:
            engine.load(state)
            assert_same(engine.state(), state, rtol=0, atol=0)
        else:
            engine = build(kind, stage=stage)
        train(engine, range(i + i // 2, i + 1 + (i + 1) // 2))
        state = engine.state()
    assert state is not None
    assert state.num_updates == 6
    assert_same(state, reference[0])


def test_bf16_stays_close_and_keeps_fp32_weights(reference: Any) -> None:
    for kind in ("torch", "deepspeed"):
        engine = build(kind, precision="bf16")
        train(engine, range(6))
        weights = engine.state().weights
        assert all(w.dtype == torch.float32 for w in weights.values())
        # bf16 has 8 bits: activations are off by up to 0.4 %; Adam moves a weight by at most 6 x 0.1 in six steps
        for name, w in weights.items():
            assert (w - reference[0].weights[name]).abs().max() < 0.1, name
        assert not all(torch.equal(w, reference[0].weights[n]) for n, w in weights.items())


def _two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    cases = {
        "torch": lambda: build("torch"),
        "zero0": lambda: build("deepspeed", stage=0),
        "zero1": lambda: build("deepspeed", stage=1),
        "zero2": lambda: build("deepspeed", stage=2),
        "accumulation": lambda: build("deepspeed", stage=1, accumulation=2),
        "torch-accumulation": lambda: build("torch", accumulation=2),
    }
    states = {}
    for name, make in cases.items():
        engine = make()
        train(engine, range(3))
        resumed = make()
        resumed.load(engine.state())
        train(resumed, range(3, 6))
        states[name] = resumed.state()
    with torch.serialization.safe_globals([EngineState]):
        half = torch.load(f"{folder}/half.pt", weights_only=True)
    for stage in range(3):
        grown = build("deepspeed", stage=stage)
        grown.load(half)
        states[f"loaded{stage}"] = grown.state()
        train(grown, range(3, 6))
        states[f"grown{stage}"] = grown.state()
        engine = build("deepspeed", stage=stage)
        train(engine, range(3))
        states[f"half{stage}"] = engine.state()
    poisoned = toy_batch(range(rank, rank + 1))
    for name, bad in (("error", float("nan") if rank else 1.0), ("errors", float("nan") if rank else float("inf"))):
        part = LossPart("label", 1.0, torch.tensor(bad), torch.tensor(1.0))
        try:
            global_loss([part], poisoned)
            states[name] = "none"
        except NonFiniteLossError as error:
            states[name] = str(error)
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    pytest.importorskip("deepspeed")
    with tempfile.TemporaryDirectory() as folder:
        engine = build("torch")
        train(engine, range(3))
        torch.save(engine.state(), f"{folder}/half.pt")
        mp.spawn(_two_ranks, (folder,), nprocs=2)
        with torch.serialization.safe_globals([EngineState]):
            return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.long
@pytest.mark.parametrize("case", ["torch", "zero0", "zero1", "zero2"])
def test_two_processes_equal_one_on_the_same_global_batch(two_ranks: Any, reference: Any, case: str) -> None:
    assert_same(two_ranks[0][case], reference[0])
    assert_same(two_ranks[1][case], two_ranks[0][case], rtol=0, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_process_that_becomes_two_equals_one_that_stays(two_ranks: Any, reference: Any, stage: int) -> None:
    engine = build("torch")
    train(engine, range(3))
    assert_same(two_ranks[0][f"loaded{stage}"], engine.state(), rtol=0, atol=0)
    assert_same(two_ranks[0][f"grown{stage}"], reference[0])


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 2), (2, 0)])
def test_two_processes_that_become_one_equal_one_that_was_alone(
    two_ranks: Any, reference: Any, before: int, after: int
) -> None:
    engine = build("deepspeed", stage=after)
    engine.load(two_ranks[0][f"half{before}"])
    assert_same(engine.state(), two_ranks[0][f"half{before}"], rtol=0, atol=0)
    train(engine, range(3, 6))
    assert_same(engine.state(), reference[0])


@pytest.mark.long
def test_accumulation_is_the_same_on_both_engines(two_ranks: Any) -> None:
    assert_same(two_ranks[0]["accumulation"], two_ranks[0]["torch-accumulation"])


@pytest.mark.long
def test_a_nan_on_one_rank_stops_all_ranks_and_names_its_keys(two_ranks: Any) -> None:
    for states in two_ranks:
        assert "rank 1: parts ['label'] of keys ['k1']" in states["error"]
        assert "rank 0" not in states["error"]
        for rank in range(2):
            assert f"rank {rank}: parts ['label'] of keys ['k{rank}']" in states["errors"]


def test_loss_divides_by_the_number_of_valid_elements() -> None:
    parts = [
        LossPart("a", 2.0, torch.tensor(6.0), torch.tensor(3.0)),
        LossPart("b", 5.0, torch.tensor(0.0), torch.tensor(0.0)),
    ]
    loss = global_loss(parts, toy_batch(range(1)), signals=(1.0, 4.0))
    assert loss.value == pytest.approx(4.0)
    assert float(loss.local) == pytest.approx(4.0)
    assert loss.means == {"a": 2.0, "b": 0.0}
    assert loss.signals == (1.0, 4.0)


def test_a_gradient_that_is_not_finite_stops_before_the_update() -> None:
    engine = build("torch")
    before = engine.state().weights
    next(engine.objective.parameters()).sum().mul(float("inf")).backward()
    with pytest.raises(NonFiniteLossError, match="gradient norm"):
        engine.step()
    assert all(torch.equal(w, before[n]) for n, w in engine.state().weights.items())


def test_learning_rate_warms_up_then_decays_to_zero() -> None:
    factor = functools.partial(learning_rate_factor, total=1000, warmup=50, power=1.0)
    values = [factor(step) for step in range(1000)]
    assert values[0] == pytest.approx(1 / 50)
    assert max(values) == values[49] == pytest.approx(1 - 49 / 1000)
    assert values[999] == pytest.approx(1e-3)
    assert learning_rate_factor(500, total=1000, warmup=0, power=2.0) == 0.25
    with pytest.raises(ValueError, match="step 1000 with total 1000"):
        factor(1000)


def test_overflow_halves_the_loss_scale_of_fp16_until_there_is_none_to_blame() -> None:
    scale = LossScale("fp16")
    for expected in (2.0**power for power in range(14, -1, -1)):
        scale.update(float("inf"))
        assert scale.value == expected
    with pytest.raises(NonFiniteLossError, match="the gradient norm is nan with a finite loss"):
        scale.update(float("nan"))
    with pytest.raises(NonFiniteLossError, match="the gradient norm is inf"):
        LossScale("fp32").update(float("inf"))


def test_impossible_engines_are_refused_with_a_reason() -> None:
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        build("torch", precision="fp16")
    with pytest.raises(ValueError, match="zero_stage must be 0, 1 or 2, got 3"):
        build("deepspeed", stage=3)
    state = build("torch").state()
    other = make_engine(
        ToyObjective(5),
        SETTINGS,
        kind="torch",
        precision="fp32",
        zero_stage=0,
        micro_batch=1,
        num_accumulation=1,
        device=CPU,
    )
    with pytest.raises(ValueError, match=r"head.*saved \(4.*model \(6"):
        other.load(state)


@pytest.mark.long
def test_a_worker_imports_neither_mlflow_nor_the_compiler_for_deepspeed() -> None:
    """They cost each start of a worker more than all else together, and nobody uses them."""
    code = """
import sys, torch
from dfa.train.engine import make_engine
from tests.train.toy import SETTINGS, ToyObjective

cpu = torch.device("cpu")
make_engine(ToyObjective(3), SETTINGS, kind="deepspeed", precision="fp32", zero_stage=1, micro_batch=2,
            num_accumulation=1, device=cpu)
print("deepspeed" in sys.modules, "mlflow" in sys.modules, "torch._inductor.compile_fx" in sys.modules)
import mlflow  # it can still be imported
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True False False"
