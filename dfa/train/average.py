"""An exponential moving average of the trained weights, beside the training."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from dfa.train.objective import Objective

_START, _SLOWNESS = 1, 10


class WeightAverage:
    """`average_n = d_n average_{n-1} + (1 - d_n) weight_n` after update n = 1, 2, ..., from average_0 = weight_0 (Polyak and
    Juditsky 1992; Tarvainen and Valpola 2017), with `d_n = min(decay, (1 + n) / (10 + n))`, so that the first weights, which are
    random, are soon forgotten.

    Every rank keeps its own, in float32: weights are the same on all ranks after an update, whatever shards the optimizer, and
    the average hangs on them and n alone. So it is the same at any number of ranks, and a loaded one continues exactly. Steps
    count, not samples: where workers do not divide the batch, longer steps count as one too.
    """

    def __init__(self, objective: Objective, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"the decay of averaged weights must lie between 0 and 1, got {decay}")
        self.decay = decay
        self._names = [name for name, _ in objective.named_parameters()]
        self._weights = list(objective.parameters())
        self._average = [weight.detach().clone() for weight in self._weights]

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Take in the weights as they are after `num_updates` updates, from 1."""
        kept = min(self.decay, (_START + num_updates) / (_SLOWNESS + num_updates))
        for average, weight in zip(self._average, self._weights, strict=True):
            average.lerp_(weight, 1 - kept)

    @contextmanager
    def used(self) -> Iterator[None]:
        """The objective has the averaged weights inside, and its own again behind, to the bit."""
        own = [weight.detach().clone() for weight in self._weights]
        self._put(self._average)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: Iterable[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """A copy on the CPU, by parameter name."""
        pairs = zip(self._names, self._average, strict=True)
        return {name: value.to("cpu", torch.float32, copy=True) for name, value in pairs}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state`. The caller has compared the weights that lie beside it with the model."""
        if set(state) != set(self._names):
            differ = sorted(set(state) ^ set(self._names))
            raise ValueError(
                f"the saved average does not fit this model: {len(differ)} names differ, first {differ[0]!r}"
            )
        for name, value in zip(self._names, self._average, strict=True):
            value.copy_(state[name])
