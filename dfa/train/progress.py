"""Which samples a run has consumed: a number of finished epochs and one bitmap for each open epoch.

A sample counts as consumed when the step that used it was made, not when it was fetched. Every rank notes its own
samples; `gather` adds the ranks up. One bit per sample and open epoch: 10 kB for COCO's 83 000 images.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from dfa.train.objective import world


class Progress:
    """Consumed samples of a run over a data set of `num_samples` per epoch."""

    def __init__(self, num_samples: int) -> None:
        if num_samples < 1:
            raise ValueError(f"a data set of {num_samples} samples cannot be trained on")
        self.num_samples = num_samples
        self.finished_epochs = 0
        self.open_epochs: dict[int, npt.NDArray[np.bool_]] = {}

    @property
    def num_consumed(self) -> int:
        """Samples consumed over all epochs."""
        return self.finished_epochs * self.num_samples + sum(int(bits.sum()) for bits in self.open_epochs.values())

    def add(self, epochs: Iterable[int], samples: Iterable[int]) -> None:
        """Mark (epoch, sample) pairs as consumed.

        Raises:
            ValueError: a pair was consumed before (the stream repeated it), or the sample number is outside the data
                set.
        """
        for epoch, sample in zip(epochs, samples, strict=True):
            if not 0 <= sample < self.num_samples:
                raise ValueError(f"sample {sample} is outside the data set of {self.num_samples}")
            bits = self.open_epochs.get(epoch)
            if epoch < self.finished_epochs or (bits is not None and bits[sample]):
                raise ValueError(f"sample {sample} was consumed twice in epoch {epoch}")
            if bits is None:
                bits = self.open_epochs[epoch] = np.zeros(self.num_samples, bool)
            bits[sample] = True
        self._close_epochs()

    def _close_epochs(self) -> None:
        while self.finished_epochs in self.open_epochs and self.open_epochs[self.finished_epochs].all():
            del self.open_epochs[self.finished_epochs]
            self.finished_epochs += 1

    def to_tensors(self) -> dict[str, Tensor]:
        """Bits packed for a safetensors file; `from_tensors` reads them."""
        packed = {f"epoch-{e}": torch.from_numpy(np.packbits(bits)) for e, bits in self.open_epochs.items()}
        return {
            "finished_epochs": torch.tensor([self.finished_epochs]),
            "num_samples": torch.tensor([self.num_samples]),
            **packed,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Progress":
        """Inverse of `to_tensors`."""
        progress = cls(int(tensors["num_samples"]))
        progress.finished_epochs = int(tensors["finished_epochs"])
        for name, packed in tensors.items():
            if name.startswith("epoch-"):
                bits = np.unpackbits(packed.numpy(), count=progress.num_samples).astype(bool)
                progress.open_epochs[int(name.removeprefix("epoch-"))] = bits
        return progress


class Ledger:
    """One rank's notes since the last `gather`, and the progress of all ranks up to it."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._pending: list[Tensor] = []

    def note(self, epoch_B: Tensor, sample_B: Tensor) -> None:
        """Remember what this rank's step consumed: two int64 vectors of equal length."""
        self._pending.append(torch.stack([epoch_B, sample_B]))

    def gather(self, device: torch.device) -> Progress:
        """Add every rank's notes to the progress; a collective, and every rank gets the same answer."""
        mine = torch.cat([torch.zeros(2, 0, dtype=torch.int64), *self._pending], dim=1)
        self._pending = []
        for pairs in _all_gather(mine.to(device)):
            self.progress.add(pairs[0].tolist(), pairs[1].tolist())
        return self.progress


def _all_gather(pairs_2N: Tensor) -> list[Tensor]:
    """The (2, N) tensors of all ranks, N differing between them."""
    _, num_ranks = world()
    if num_ranks == 1:
        return [pairs_2N]
    lengths = [torch.zeros(1, dtype=torch.int64, device=pairs_2N.device) for _ in range(num_ranks)]
    dist.all_gather(lengths, torch.tensor([pairs_2N.shape[1]], device=pairs_2N.device))
    longest = max(int(n) for n in lengths)
    padded = torch.nn.functional.pad(pairs_2N, (0, longest - pairs_2N.shape[1]))
    parts = [torch.empty_like(padded) for _ in range(num_ranks)]
    dist.all_gather(parts, padded)
    return [part[:, : int(n)].cpu() for part, n in zip(parts, lengths, strict=True)]
