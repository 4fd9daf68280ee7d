"""What is kept of any number of pairs: sums that add up, written down part by part so that a killed job goes on.

OUTPUT/plan.json               what is compared, and how
OUTPUT/parts/part-000000.json  the sums of one part, with the hash of its files and of the settings; written whole or not
OUTPUT/rejects.jsonl           one line per pair that is not in the sums, with its reason, at the end
OUTPUT/analysis.json, .html    likewise
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dfa.analysis.maps import Array, MapLimits, PairPart
from dfa.core.analysis.cross_entropy import CrossEntropySums, cross_entropy_sums, no_cross_entropy
from dfa.core.analysis.labels import LabelSums, boundary_sums, label_sums, no_labels
from dfa.core.analysis.truncation import resize_features
from dfa.data import storage

logger = logging.getLogger(__name__)

PLAN_NAME, PLAN_KIND, PARTS_FOLDER = "plan.json", "dfa-analysis-plan", "parts"
FORMAT_VERSION = 1
_OWN_NAME = re.compile(r"part-\d+\.json")
_TENSORS = {"band_CK": torch.float64, "truth_C": torch.int64, "prediction_C": torch.int64, "common_C": torch.int64}


@dataclass(frozen=True)
class AnalysisSettings:
    """nu_max: the highest band. boundary: also the sums of boundary regions."""

    limits: MapLimits
    nu_max: int
    boundary: bool


@dataclass(frozen=True)
class PairReject:
    """A pair that is not in the sums, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class PairSums:
    """Sums of any number of pairs; those of two parts add up with `+`.

    labels: of the label maps (of logits their argmax). boundary: of their boundary regions, None where not asked for. logits:
    cross entropy of the predictions that are logits.
    """

    labels: LabelSums
    boundary: LabelSums | None
    logits: CrossEntropySums
    rejects: tuple[PairReject, ...] = ()

    def __add__(self, other: "PairSums") -> "PairSums":
        boundary = None if self.boundary is None or other.boundary is None else self.boundary + other.boundary
        return PairSums(
            self.labels + other.labels, boundary, self.logits + other.logits, (*self.rejects, *other.rejects)
        )

    def cross_entropy(self, epsilon: float | None = None) -> CrossEntropySums:
        """Of the logits, or where there were none of label maps as `LabelSums.cross_entropy` reads them.

        Raises:
            ValueError: logits for some of the images and label maps for others.
        """
        if self.logits.num_images not in (0, self.labels.num_images):
            raise ValueError(
                f"{self.logits.num_images} of {self.labels.num_images} predictions are logits, the others label maps; their"
                " cross entropies do not add up: analyse them apart"
            )
        return self.logits if self.logits.num_images else self.labels.cross_entropy(epsilon)


def no_pairs(settings: AnalysisSettings) -> PairSums:
    """The sums of no pair."""
    none = no_labels(num_classes=settings.limits.num_classes, nu_max=settings.nu_max)
    return PairSums(none, none if settings.boundary else None, no_cross_entropy(settings.nu_max))


def sum_pairs(part: PairPart, settings: AnalysisSettings) -> PairSums:
    """The sums of a part, one pair in memory at a time; a pair that cannot be used is a reject.

    Raises:
        BrokenShardError, OSError: a shard that cannot be read.
    """
    truths, predictions = (side.open(part.keys, settings.limits) for side in (part.truth, part.prediction))
    sums, rejects = no_pairs(settings), list[PairReject]()
    for key in part.keys:
        side = "truth"
        try:
            truth_HW = truths(key)
            side = "prediction"
            prediction = predictions(key)
            side = "pair"
            sums = sums + pair_sums(prediction, truth_HW, settings)
        except (ValueError, FileNotFoundError) as error:
            rejects.append(PairReject(key, f"{side}: {error}"))
    return replace(sums, rejects=tuple(rejects))


def pair_sums(prediction: Array, truth_HW: Array, settings: AnalysisSettings) -> PairSums:
    """The sums of one pair.

    prediction: uint8 (H, W), or float logits (C + 1, h, w), which are brought to the size of the truth bilinearly.
    truth_HW: uint8.

    Raises:
        ValueError: sizes that differ, values that are no classes, logits that are not finite.
    """
    truth, found = torch.from_numpy(truth_HW), torch.from_numpy(prediction)
    options: dict[str, Any] = {"num_classes": settings.limits.num_classes, "nu_max": settings.nu_max}
    logits = no_cross_entropy(settings.nu_max)
    if truth.ndim != 2:
        raise ValueError(f"the truth must be a label map (H, W), got {tuple(truth.shape)}")
    if found.ndim == 3:
        if not bool(found.isfinite().all()):
            raise ValueError("the logits are not finite")
        size = (truth.shape[0], truth.shape[1])
        full = resize_features(found[None] if found.dtype == torch.float64 else found[None].float(), size)
        logits = cross_entropy_sums(full, truth[None], nu_max=settings.nu_max)
        found = full[0].argmax(0).to(torch.uint8)
    labels = label_sums(found, truth, **options)
    return PairSums(labels, boundary_sums(found, truth, **options) if settings.boundary else None, logits)


def begin(output: str, plan: dict[str, Any]) -> None:
    """Make OUTPUT a folder of this analysis. Parts of another one that lie there are done anew.

    Raises:
        ValueError: it holds something else, or cannot be written.
    """
    plan, address = {"kind": PLAN_KIND, "format": FORMAT_VERSION} | plan, storage.join(output, PLAN_NAME)
    try:
        storage.make_folder(storage.join(output, PARTS_FOLDER))
        if storage.exists(address):
            found = storage.read_json(address)
            if not isinstance(found, dict) or found.get("kind") != PLAN_KIND:
                raise ValueError(f"{address} is no plan of an analysis; choose an empty or a new folder")
            differ = sorted(key for key in {*found, *plan} if found.get(key) != plan.get(key))
            if differ:
                told = ", ".join(f"{key} {found.get(key)}" for key in differ)
                logger.warning("%s held the analysis of another %s; it is replaced", output, told)
        elif names := [name for name in storage.list_names(output) if name != PARTS_FOLDER and name[0] != "."]:
            raise ValueError(
                f"{output} is not empty and holds no analysis ({', '.join(names[:4])}); choose an empty or a new folder"
            )
        storage.write_json(address, plan)
    except storage.StoreError:
        raise
    except OSError as error:
        raise ValueError(f"the analysis cannot be written to {output}: {error}") from error


def commit(output: str, part: str, digest: str, sums: PairSums) -> None:
    """Write the sums of a part."""
    document = {"hash": digest, "sums": to_plain(sums)}
    try:
        storage.write_json(_address(output, part), document)
    except storage.StoreError:
        raise
    except OSError as error:
        raise ValueError(
            f"the sums of {part} cannot be written to {output}: {error}; parts that were written stay, and the same command"
            " goes on from them"
        ) from error


def committed(output: str, part: str, digest: str) -> PairSums | None:
    """The sums of a part that were made of these very files with these settings, else None."""
    address = _address(output, part)
    if not storage.exists(address):
        return None
    try:
        document = storage.read_json(address)
    except storage.StoreError:
        raise  # not read is not the same as not there
    except ValueError:
        return None
    return from_plain(document["sums"]) if document.get("hash") == digest else None


def total(output: str, parts: Sequence[tuple[str, str]], settings: AnalysisSettings) -> PairSums:
    """The sum of all parts (name, hash), read again in their order, so that it does not depend on who did what when.

    Parts of an earlier analysis that are not among them are deleted.

    Raises:
        ValueError: a part is missing, or is another analysis' since a moment ago.
    """
    sums = no_pairs(settings)
    for name, digest in parts:
        found = committed(output, name, digest)
        if found is None:
            raise ValueError(
                f"{output}: the sums of {name} are missing or of other files; another analysis writes here, or the files"
                " changed meanwhile: run the job again, alone in its folder"
            )
        sums = sums + found
    folder, wanted = storage.join(output, PARTS_FOLDER), {f"{name}.json" for name, _ in parts}
    for name in storage.list_names(folder):
        stale = _OWN_NAME.fullmatch(name) or name.endswith(storage.PARTIAL_SUFFIX)
        if stale and name not in wanted:
            storage.remove(storage.join(folder, name))
    return sums


def _address(output: str, part: str) -> str:
    return storage.join(output, f"{PARTS_FOLDER}/{part}.json")


def to_plain(sums: PairSums) -> dict[str, Any]:
    """For JSON, exactly: Python writes the shortest digits that give the same float64 again."""
    return {
        "labels": _labels_to_plain(sums.labels),
        "boundary": None if sums.boundary is None else _labels_to_plain(sums.boundary),
        "logits": asdict(sums.logits) | {"band_K": sums.logits.band_K.tolist()},
        "rejects": [asdict(each) for each in sums.rejects],
    }


def from_plain(plain: dict[str, Any]) -> PairSums:
    """`to_plain` undone."""
    boundary, logits = plain["boundary"], plain["logits"]
    return PairSums(
        _labels_from_plain(plain["labels"]),
        None if boundary is None else _labels_from_plain(boundary),
        CrossEntropySums(**logits | {"band_K": torch.tensor(logits["band_K"], dtype=torch.float64)}),
        tuple(PairReject(**each) for each in plain["rejects"]),
    )


def _labels_to_plain(sums: LabelSums) -> dict[str, Any]:
    found: dict[str, Tensor] = {name: getattr(sums, name) for name in _TENSORS}
    return {name: value.tolist() for name, value in found.items()} | {"num_images": sums.num_images}


def _labels_from_plain(plain: dict[str, Any]) -> LabelSums:
    tensors = {name: torch.tensor(plain[name], dtype=dtype) for name, dtype in _TENSORS.items()}
    return LabelSums(**tensors, num_images=plain["num_images"])
