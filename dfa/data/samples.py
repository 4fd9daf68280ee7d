"""What a source yields: a Sample for each usable image, a Reject with the reason for each other."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dfa.core.void import label_dtype, void_label
from dfa.data.labels import NO_LABEL, LabelProblem, Labels
from dfa.data.transforms import LabelArray

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png")
_MAX_KEY_LENGTH = 80
_NAMES_AND_NUMBERS = re.compile(r"'[^']*'|\S*/\S*|\d+")


@dataclass(frozen=True)
class MaskFile:
    """A mask that lies on disk as PNG."""

    path: str


@dataclass(frozen=True)
class Segment:
    """One region: value to paint and COCO's compressed run-length code (column-major)."""

    value: int
    counts: bytes


@dataclass(frozen=True)
class MaskSegments:
    """A mask to be painted: segments in painting order, later ones on top."""

    height: int
    width: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Sample:
    """One image and what is known about it; complete in itself, so that a remote task needs no other file but these.

    Attributes:
        key: unique name of letters, digits, `_` and `-`; also what randomness is keyed by.
        image: path of the JPEG or PNG.
        labels: ascending class indices 1..C; empty only where the source keeps unlabelled images as all-background.
        mask: ground truth, or None.
    """

    key: str
    image: str
    labels: tuple[int, ...]
    mask: MaskFile | MaskSegments | None = None


@dataclass(frozen=True)
class Reject:
    """One image that was left out, and why."""

    key: str
    path: str
    reason: str


def sample_key(name: str) -> str:
    """Return the key of an image name (without extension): anything but letters, digits, `_`, `-` becomes `_`.

    WebDataset splits member names at the first dot and some tools at slashes. Names beyond 80 characters, of which the
    first 63 are kept, and names in other scripts, of which little is left, end in a hash. Two names may still meet in one
    key; `plan_shards` refuses that.
    """
    key = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    if not key:
        raise ValueError("an image has an empty name")
    if len(key) > _MAX_KEY_LENGTH or not name.isascii():
        key = key[:63] + "-" + hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
    return key


def check_mask_values(mask_HW: LabelArray, *, num_classes: int, where: str) -> None:
    """Raise a ValueError unless the type is that of C classes and all values are 0..C or void."""
    void = void_label(num_classes)
    if mask_HW.dtype != label_dtype(num_classes):
        raise ValueError(
            f"{where} has {8 * mask_HW.itemsize}-bit values; masks of {num_classes} classes have "
            f"{void.bit_length()}-bit values and {void} for void"
        )
    values = np.flatnonzero(np.bincount(mask_HW.reshape(-1), minlength=256))
    wrong = [int(value) for value in values if num_classes < value != void]
    if wrong:
        hint = " (COCO's original category ids must become 1..80 by ascending id)" if max(wrong) <= 91 else ""
        raise ValueError(f"{where} has values {wrong[:8]}; allowed are 0..{num_classes} and {void}{hint}")


def judge(
    key: str, image: str, labels: Labels | None, mask: MaskFile | MaskSegments | None, *, keep_unlabelled: bool
) -> Sample | Reject:
    """Make the sample, or the reject that its labels call for; None stands for an image that nothing is said about."""
    if labels is None:
        labels = LabelProblem(NO_LABEL)
    if isinstance(labels, LabelProblem):
        if not (keep_unlabelled and labels.reason.startswith(NO_LABEL)):
            return Reject(key, image, labels.reason)
        labels = ()
    return Sample(key, image, labels, mask)


def summarize_rejects(rejects: Iterable[Reject], *, num_shown: int = 4) -> str:
    """Return one reject of each of the first few kinds of reasons, and how many are like it, for a message.

    Reasons are of one kind that differ in names and numbers alone.
    """
    kinds: dict[str, list[Reject]] = {}
    for reject in rejects:
        kinds.setdefault(_NAMES_AND_NUMBERS.sub("", reject.reason), []).append(reject)
    told = [
        f"{first.key}: {first.reason}" + (f" (and {len(others)} like it)" if others else "")
        for first, *others in list(kinds.values())[:num_shown]
    ]
    return "; ".join(told + ([f"and {len(kinds) - num_shown} more kinds"] if len(kinds) > num_shown else []))
