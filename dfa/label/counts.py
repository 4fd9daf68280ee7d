"""Additive integer counts of which most are zero: confusion matrices of a thousand classes at twenty thresholds."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Counts:
    """An int64 array by its entries that are not zero: one image shows few classes, however many there are.

    shape: of the whole array. place_E: ascending indices into it, flattened. value_E: the counts there.
    """

    shape: tuple[int, ...]
    place_E: Ints
    value_E: Ints

    @staticmethod
    def zero(*shape: int) -> "Counts":
        """Nothing counted."""
        return Counts(shape, np.zeros(0, np.int64), np.zeros(0, np.int64))

    @staticmethod
    def of(dense: Tensor) -> "Counts":
        """The counts of a tensor."""
        flat = dense.detach().cpu().numpy().reshape(-1)
        place_E = np.flatnonzero(flat)
        return Counts(tuple(dense.shape), place_E, flat[place_E].astype(np.int64))

    def __add__(self, other: "Counts") -> "Counts":
        if self.shape != other.shape:
            raise ValueError(f"counts of shapes {self.shape} and {other.shape} cannot be added")
        place_E, entry_P = np.unique(np.concatenate([self.place_E, other.place_E]), return_inverse=True)
        value_E = np.zeros(len(place_E), np.int64)
        np.add.at(value_E, entry_P, np.concatenate([self.value_E, other.value_E]))
        return Counts(self.shape, place_E, value_E)

    def dense(self) -> Tensor:
        """The whole array, int64, in memory of its own."""
        flat = np.zeros(math.prod(self.shape), np.int64)
        flat[self.place_E] = self.value_E
        return torch.from_numpy(flat.reshape(self.shape))
