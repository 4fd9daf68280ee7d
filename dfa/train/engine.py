"""One optimizer step over any number of processes, by DeepSpeed (ZeRO 0, 1, 2) or by plain torch, behind the same
calls.

Both engines agree on four things:

- parameters, moments and gradients of the trainable part stay float32; ``bf16`` and ``fp16`` are torch autocast around
  the forward pass. The numerical parts that must stay float32 switch autocast off themselves, and a state is the same
  numbers at every precision;
- a parameter that got no gradient counts as having gradient zero (so its moments and its weight decay advance
  everywhere alike);
- the loss given to ``backward`` is a sum whose gradients are *averaged* over ranks and accumulated micro-batches;
- ``state`` is a portable float32 record by parameter name: any engine, world size and ZeRO stage can load what another
  one saved.
"""

import importlib.util
import os
import tempfile
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dfa.data.stream import Batch
from dfa.train.adam import LossScale, check_names, cpu_weights, fill_moments, make_optimizer, set_learning_rate
from dfa.train.lean_deepspeed import import_deepspeed, quiet
from dfa.train.objective import (
    EngineState,
    LossPart,
    Objective,
    OptimizerSettings,
    all_reduce_sum,
    world,
)

Precision = Literal["fp32", "bf16", "fp16"]
EngineKind = Literal["auto", "deepspeed", "torch"]

_AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}
_BUCKET_ELEMENTS = 2**23  # DeepSpeed's default bucket of 5e8 elements alone would take 2 GB on a CPU


class Engine(Protocol):
    """The few calls that the loop makes. ``backward`` is called ``num_accumulation`` times per ``step``."""

    objective: Objective
    device: torch.device
    num_accumulation: int

    def forward(self, batch: Batch) -> list[LossPart]:
        """Loss parts of this rank's micro-batch, under the engine's precision."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a scalar loss."""
        ...

    def step(self) -> float:
        """Average, clip, update, clear. Returns the global gradient norm before clipping (inf: fp16 overflow,
        update skipped)."""
        ...

    def set_learning_rate(self, factor: float) -> None:
        """Learning rate of every group = base x group scale x ``factor`` for the coming step."""
        ...

    def state(self) -> EngineState:
        """Portable state; every rank must call it, every rank gets all of it."""
        ...

    def load(self, state: EngineState) -> None:
        """Continue from a state that any engine saved. ValueError names parameters that do not match."""
        ...


def resolve_engine(kind: EngineKind) -> Literal["deepspeed", "torch"]:
    """``auto`` is deepspeed where it is installed, else torch; asking for an absent deepspeed is an error."""
    present = importlib.util.find_spec("deepspeed") is not None
    if kind == "deepspeed" and not present:
        raise ValueError(
            "engine 'deepspeed' was asked for but deepspeed is not installed; install it or set engine to 'torch'"
        )
    return "deepspeed" if kind != "torch" and present else "torch"


def make_engine(
    objective: Objective,
    settings: OptimizerSettings,
    *,
    kind: EngineKind,
    precision: Precision,
    zero_stage: int,
    micro_batch: int,
    num_accumulation: int,
    device: torch.device,
) -> Engine:
    """Build the engine on every rank alike. ``zero_stage`` (0, 1, 2) and ``micro_batch`` concern deepspeed only."""
    if precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"precision must be fp32, bf16 or fp16, got {precision!r}")
    if precision == "fp16" and device.type == "cpu":
        raise ValueError(
            "precision fp16 needs a GPU (float16 is slow and overflows on CPUs); use bf16 or fp32 on this device"
        )
    if zero_stage not in (0, 1, 2):
        raise ValueError(f"zero_stage must be 0, 1 or 2, got {zero_stage}")
    if resolve_engine(kind) == "torch":
        return TorchEngine(objective, settings, precision=precision, num_accumulation=num_accumulation, device=device)
    return DeepSpeedEngine(
        objective,
        settings,
        precision=precision,
        zero_stage=zero_stage,
        micro_batch=micro_batch,
        num_accumulation=num_accumulation,
        device=device,
    )


class _Precise(nn.Module):
    """The objective under its precision. Autocast sits inside, where DeepSpeed cannot see it and replace it by its
    own."""

    def __init__(self, objective: Objective, precision: Precision, device: torch.device) -> None:
        super().__init__()
        self.objective = objective
        self._dtype = _AUTOCAST_DTYPE.get(precision)
        self._device_type = device.type

    def forward(self, batch: Batch) -> list[LossPart]:
        if self._dtype is None:
            return self.objective(batch)
        with torch.autocast(self._device_type, dtype=self._dtype):
            return self.objective(batch)


class TorchEngine:
    """AdamW with one flat gradient all-reduce per step (the trainable part is a few million numbers, overlap would
    gain nothing)."""

    def __init__(
        self,
        objective: Objective,
        settings: OptimizerSettings,
        *,
        precision: Precision,
        num_accumulation: int,
        device: torch.device,
    ) -> None:
        self.objective, self.device, self.num_accumulation = objective.to(device), device, num_accumulation
        self._settings = settings
        self._module = _Precise(objective, precision, device)
        self._optimizer = make_optimizer(objective, settings)
        self._scale = LossScale(precision)
        if world()[1] > 1:
            for tensor in objective.state_dict().values():
                dist.broadcast(tensor, src=0)

    def forward(self, batch: Batch) -> list[LossPart]:
        return self._module(batch)

    def backward(self, loss: Tensor) -> None:
        (loss * (self._scale.value / self.num_accumulation)).backward()

    def step(self) -> float:
        parameters = list(self.objective.parameters())
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        all_reduce_sum(flat).div_(world()[1] * self._scale.value)
        norm = float(flat.norm())
        self._scale.update(norm)
        if norm < float("inf"):
            clip = self._settings.gradient_clip
            if clip > 0:
                flat.mul_(min(1.0, clip / (norm + 1e-6)))
            for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad = grad.view_as(p)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def set_learning_rate(self, factor: float) -> None:
        set_learning_rate(self._optimizer.param_groups, self._settings.learning_rate, factor)

    def state(self) -> EngineState:
        moments = {name: self._optimizer.state.get(p, {}) for name, p in self.objective.named_parameters()}
        zero = {name: torch.zeros_like(p) for name, p in self.objective.named_parameters()}
        first, second = (
            {n: m.get(key, zero[n]).detach().cpu().clone() for n, m in moments.items()}
            for key in ("exp_avg", "exp_avg_sq")
        )
        num_updates = max((int(m["step"]) for m in moments.values() if "step" in m), default=0)
        return EngineState(cpu_weights(self.objective, {}), first, second, num_updates, self._scale.value)

    def load(self, state: EngineState) -> None:
        check_names(self.objective, state)
        self.objective.load_state_dict(state.weights)
        fill_moments(self._optimizer, dict(self.objective.named_parameters()), state)
        self._scale.value = state.loss_scale if self._scale.dynamic else 1.0


class DeepSpeedEngine:
    """DeepSpeed with ZeRO 0, 1 or 2 around the same AdamW.

    DeepSpeed runs in its float32 mode. Its own ``torch_autocast`` is not used: with fp16 it scales the loss but clips
    the scaled gradient, and decides on overflow rank by rank (0.19.8). ZeRO's external loss scale does both rightly, so
    fp16 needs stage 1 or 2.
    """

    def __init__(
        self,
        objective: Objective,
        settings: OptimizerSettings,
        *,
        precision: Precision,
        zero_stage: int,
        micro_batch: int,
        num_accumulation: int,
        device: torch.device,
    ) -> None:
        if precision == "fp16" and zero_stage == 0:
            raise ValueError(
                "deepspeed with fp16 needs zero_stage 1 or 2 (stage 0 has no loss scaling), or engine 'torch'"
            )
        _ensure_process_group(device)
        self.objective, self.device, self.num_accumulation = objective.to(device), device, num_accumulation
        self._settings, self._stage = settings, zero_stage
        self._scale = LossScale(precision)
        config = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": num_accumulation,
            "gradient_clipping": settings.gradient_clip,
            "zero_optimization": {
                "stage": zero_stage,
                "reduce_bucket_size": _BUCKET_ELEMENTS,
                "allgather_bucket_size": _BUCKET_ELEMENTS,
                "overlap_comm": False,
            },
            "steps_per_print": 2**62,
        }
        deepspeed = import_deepspeed(device)
        with quiet():
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=_Precise(objective, precision, device),
                optimizer=make_optimizer(objective, settings),
                config=config,
                dist_init_required=False,
            )

    def forward(self, batch: Batch) -> list[LossPart]:
        return self._engine(batch)

    def backward(self, loss: Tensor) -> None:
        if self._scale.dynamic:
            self._optimizer.override_loss_scale(self._scale.value)
        self._engine.backward(loss)
        if self._engine.is_gradient_accumulation_boundary():
            return
        self._engine.step()  # only counts the micro-batch: DeepSpeed wants one step() per backward()

    def step(self) -> float:
        if self._stage == 0:
            return self._step_unsharded()
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        self._scale.update(norm)
        return norm

    def _step_unsharded(self) -> float:
        parameters = list(self.objective.parameters())
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        self._scale.update(norm)
        self._engine.step()
        return norm

    def set_learning_rate(self, factor: float) -> None:
        set_learning_rate(self._optimizer.param_groups, self._settings.learning_rate, factor)

    def state(self) -> EngineState:
        parameters = dict(self.objective.named_parameters())
        num_updates = self._num_updates()
        if self._stage > 0 and num_updates:
            self._link_moments()
        moments = []
        for key in ("exp_avg", "exp_avg_sq"):
            read = {n: self._read(p, key) if num_updates else torch.zeros_like(p) for n, p in parameters.items()}
            moments.append({n: m.detach().to("cpu", torch.float32, copy=True) for n, m in read.items()})
        weights = {n: self._read(p, None) for n, p in parameters.items()}
        return EngineState(cpu_weights(self.objective, weights), moments[0], moments[1], num_updates, self._scale.value)

    def load(self, state: EngineState) -> None:
        check_names(self.objective, state)
        self.objective.load_state_dict(state.weights)
        parameters = dict(self.objective.named_parameters())
        self._scale.value = state.loss_scale if self._scale.dynamic else 1.0
        if self._stage == 0:
            return fill_moments(self._optimizer, parameters, state)
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        base, partitions = self._optimizer.optimizer, self._optimizer.single_partition_of_fp32_groups
        for flat in partitions:  # ZeRO makes Adam's state at its first step only; safe_set_* need it to exist
            step = torch.tensor(float(state.num_updates))
            base.state[flat] = {"step": step, "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
        self._link_moments()
        for name, p in parameters.items():
            safe_set_full_fp32_param(p, state.weights[name].to(self.device))
            safe_set_full_optimizer_state(p, state.moment1[name].to(self.device), "exp_avg")
            safe_set_full_optimizer_state(p, state.moment2[name].to(self.device), "exp_avg_sq")
        self._optimizer.update_lp_params()
        return None

    def _link_moments(self) -> None:
        """Let safe_get/set_* find Adam's state: ZeRO links it once, after the first group's first step, when
        later groups have none yet."""
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()

    def _num_updates(self) -> int:
        base = self._optimizer if self._stage == 0 else self._optimizer.optimizer
        return max((int(s["step"]) for s in base.state.values() if "step" in s), default=0)

    def _read(self, p: nn.Parameter, key: str | None) -> Tensor:
        """Full float32 weight (``key`` None) or moment of one parameter; a collective under ZeRO."""
        if self._stage == 0:
            return p if key is None else self._optimizer.state[p][key]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        value = safe_get_full_fp32_param(p) if key is None else safe_get_full_optimizer_state(p, key)
        if value is None:
            raise RuntimeError(
                "deepspeed holds no float32 original of a trainable parameter; was it excluded from the optimizer?"
            )
        return value


def _ensure_process_group(device: torch.device) -> None:
    """DeepSpeed needs a process group even for one process; a file store needs no network."""
    if dist.is_initialized():
        return
    address = "file://" + os.path.join(tempfile.mkdtemp(prefix="dfa-store-"), "store")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=address, rank=0, world_size=1)
