"""What is trained, as the engines and the loop see it: parameter groups, loss parts, their global mean, the learning
rate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dfa.data.stream import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning-rate multiple and a weight decay (METHOD row 1.21: decoder group x10)."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    learning_rate_scale: float
    weight_decay: float


@dataclass(frozen=True)
class LossPart:
    """One term of the loss on this rank: ``total`` is the sum over its valid elements, ``count`` their number (both
    scalars)."""

    name: str
    weight: float
    total: Tensor
    count: Tensor


class Objective(nn.Module):
    """What the loop trains. Registered parameters are exactly the trainable ones; what is frozen is held outside
    registration."""

    num_classes: int
    """Rows of the confusion matrix that ``validate`` returns (background included)."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """Every registered parameter in exactly one group."""
        raise NotImplementedError

    def begin_step(self, step: int) -> None:
        """Told before each step's forward passes which one it is, 0-based, after a resume too. Does nothing by itself."""

    def forward(self, batch: Batch) -> list[LossPart]:
        """The parts of the loss, always the same names in the same order."""
        raise NotImplementedError

    def validate(self, batch: Batch) -> Tensor:
        """Additive integer confusion matrix, (num_classes, num_classes) int64, of one batch that carries masks."""
        raise NotImplementedError


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW of the run. ``learning_rate`` is the base; groups multiply it, the schedule multiplies it again."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    gradient_clip: float
    """Largest global L2 norm of the gradient; 0 switches clipping off."""


@dataclass(frozen=True)
class EngineState:
    """Portable training state, float32 on the CPU, by parameter name as in ``objective.state_dict()``."""

    weights: dict[str, Tensor]
    moment1: dict[str, Tensor]
    moment2: dict[str, Tensor]
    num_updates: int
    loss_scale: float


class NonFiniteLossError(RuntimeError):
    """A part of the loss, or the gradient, is NaN or infinite. Raised on every rank before the update."""


def world() -> tuple[int, int]:
    """(rank, number of ranks) of the default process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum of ``tensor`` over ranks, in place; the tensor itself without a process group."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_objects(mine: T) -> list[T]:
    """The objects of all ranks, in their order; `mine` alone without a process group. They are pickled: small ones."""
    found = [mine] * world()[1]
    if len(found) > 1:
        dist.all_gather_object(found, mine)
    return found


def learning_rate_factor(step: float, *, total: float, warmup: float, power: float) -> float:
    """Share of the base learning rate at ``step`` (0-based, about to be made): linear warm-up times polynomial decay.

    ``min(1, (step + 1) / warmup) * (1 - step / total) ** power`` (METHOD row 1.21: 50 warm-up steps, power 1). Our
    reading: the two are multiplied, so the curve is continuous where warm-up ends. ``total`` and ``warmup`` in steps;
    ``warmup`` 0 means none.

    >>> learning_rate_factor(50, total=100, warmup=10, power=1.0)
    0.5
    """
    if not 0 <= step < total:
        raise ValueError(f"step must lie in [0, total), got step {step} with total {total}")
    if warmup < 0 or power < 0:
        raise ValueError(f"warmup and power must not be negative, got warmup {warmup}, power {power}")
    return min(1.0, (step + 1) / warmup if warmup else 1.0) * (1.0 - step / total) ** power


@dataclass(frozen=True)
class GlobalLoss:
    """Loss of one micro-batch over all ranks: what this rank backpropagates, and what is reported."""

    local: Tensor
    """Scalar to hand to ``Engine.backward``: world x sum of weight x total / global count."""
    value: float
    means: dict[str, float]
    """Part name -> global mean (0 where no element was valid)."""
    signals: tuple[float, ...]
    """Sums over ranks of the numbers that travelled along."""


def global_loss(parts: Sequence[LossPart], batch: Batch, *, signals: Sequence[float] = ()) -> GlobalLoss:
    """Divide every part by its *global* number of valid elements, with one small all-reduce.

    ``loss = sum_p weight_p * (sum over ranks total_p) / (sum over ranks count_p)``; gradients are averaged over ranks
    afterwards, hence the factor world in ``local``. Counts are global over the ranks of one micro-batch; accumulated
    micro-batches are averaged. ``signals`` (a stop request, say) are summed over ranks in the same message.

    Raises NonFiniteLossError on all ranks alike when any part of any rank is NaN or infinite, naming the keys of those
    ranks' batches.
    """
    device = parts[0].total.device
    local = torch.stack([p.total.detach().double() for p in parts] + [p.count.detach().double() for p in parts])
    message = torch.cat([local, torch.tensor(list(signals), dtype=torch.float64, device=device)])
    summed = all_reduce_sum(message.clone()).cpu()
    totals, counts, sums = summed[: len(parts)], summed[len(parts) : 2 * len(parts)], summed[2 * len(parts) :]
    if not torch.isfinite(summed[: 2 * len(parts)]).all():
        _raise_non_finite(parts, batch)
    _, num_ranks = world()
    loss = torch.stack(
        [p.weight * num_ranks / max(float(c), 1e-12) * p.total for p, c in zip(parts, counts, strict=True)]
    ).sum()
    means = {p.name: float(t / c) if c > 0 else 0.0 for p, t, c in zip(parts, totals, counts, strict=True)}
    return GlobalLoss(loss, sum(p.weight * means[p.name] for p in parts), means, tuple(sums.tolist()))


def _raise_non_finite(parts: Sequence[LossPart], batch: Batch) -> None:
    bad = [p.name for p in parts if not (torch.isfinite(p.total).all() and torch.isfinite(p.count).all())]
    reports = gather_objects((world()[0], bad, list(batch.keys)) if bad else None)
    found = "; ".join(f"rank {r}: parts {names} of keys {keys}" for r, names, keys in filter(None, reports))
    raise NonFiniteLossError(f"the loss is not finite, stopped before the update ({found})")
