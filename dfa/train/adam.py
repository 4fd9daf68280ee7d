"""AdamW and its state as both engines share them: groups, learning rates, loss scale, portable float32 numbers."""

import inspect
import logging
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dfa.train.objective import EngineState, NonFiniteLossError, Objective, OptimizerSettings

logger = logging.getLogger(__name__)

_LOSS_SCALE_START = 2.0**15
_LOSS_SCALE_GROWTH_INTERVAL = 1000


class LossScale:
    """Dynamic scale of an fp16 loss: halves on overflow, doubles after a long run without one. Constant 1 otherwise."""

    def __init__(self, precision: str) -> None:
        self.dynamic = precision == "fp16"
        self.value = _LOSS_SCALE_START if self.dynamic else 1.0
        self._num_good = 0

    def update(self, norm: float) -> None:
        """Take note of a step's gradient norm; NonFiniteLossError where there is no scale to blame, or none left."""
        finite = norm == norm and norm != float("inf")
        if not finite and self.value <= 1.0:
            raise NonFiniteLossError(f"the gradient norm is {norm} with a finite loss, stopped before the update")
        if not finite:
            self.value, self._num_good = self.value / 2, 0
            logger.warning("fp16 gradients overflowed, update skipped, loss scale now %g", self.value)
            return
        self._num_good += 1
        if self.dynamic and self._num_good % _LOSS_SCALE_GROWTH_INTERVAL == 0:
            self.value *= 2


def make_optimizer(objective: Objective, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over the objective's groups; a ValueError if a registered parameter is in none or in two."""
    groups = objective.parameter_groups()
    grouped = [id(p) for group in groups for p in group.parameters]
    known = {id(p): name for name, p in objective.named_parameters()}
    missing = [name for key, name in known.items() if key not in set(grouped)]
    if missing or len(grouped) != len(set(grouped)) or set(grouped) - set(known):
        raise ValueError(
            f"every registered parameter must be in exactly one group; missing {missing}, "
            f"{len(grouped)} grouped of {len(known)}"
        )
    options = [
        {"params": list(g.parameters), "weight_decay": g.weight_decay, "scale": g.learning_rate_scale, "lr": 0.0}
        for g in groups
        if g.parameters
    ]
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        _uncompiled(getattr(torch.optim.Optimizer, name))
    optimizer = torch.optim.AdamW(options, lr=0.0, betas=(settings.beta1, settings.beta2), eps=settings.epsilon)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
    return optimizer


def _uncompiled(method: Any) -> None:
    """Let a method of optimizers run as it is. At its first call torch would import its compiler, only to keep the compiler
    away from it: 1.8 CPU seconds of every worker's start. `AdamW.step` imports it in any case, hence the one above."""
    plain = inspect.unwrap(method)
    plain.__dynamo_disable = plain


def set_learning_rate(groups: Iterable[dict[str, Any]], base: float, factor: float) -> None:
    """Learning rate of every group = base x its scale x factor."""
    for group in groups:
        group["lr"] = base * group["scale"] * factor


def cpu_weights(objective: Objective, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the objective with `parameters` (float32 originals) put in, copied to the CPU."""
    weights = {**objective.state_dict(), **parameters}
    return {
        k: v.detach().to("cpu", torch.float32 if v.is_floating_point() else v.dtype, copy=True)
        for k, v in weights.items()
    }


def check_names(objective: Objective, state: EngineState) -> None:
    """Raise a ValueError that names the first entry whose name or shape differs between state and model."""
    want = {k: tuple(v.shape) for k, v in objective.state_dict().items()}
    have = {k: tuple(v.shape) for k, v in state.weights.items()}
    if want != have:
        differ = sorted(k for k in want.keys() | have.keys() if want.get(k) != have.get(k))
        first = differ[0]
        raise ValueError(
            f"the saved state does not fit this model: {len(differ)} entries differ, first {first!r}: "
            f"saved {have.get(first)}, model {want.get(first)}"
        )


def fill_moments(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], state: EngineState) -> None:
    """Set Adam's state of unsharded float32 parameters."""
    for name, p in parameters.items():
        optimizer.state[p] = {
            "step": torch.tensor(float(state.num_updates)),
            "exp_avg": state.moment1[name].to(p.device, copy=True),
            "exp_avg_sq": state.moment2[name].to(p.device, copy=True),
        }
