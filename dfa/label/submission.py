"""Masks of a test set as the archive that the PASCAL VOC evaluation server takes."""

import gzip
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from dfa.data import storage
from dfa.data.writer import add_member
from dfa.label.finished import read_label_index, samples_of
from dfa.label.output import MASK_EXTENSION

COMPETITIONS = ("comp5", "comp6")


def export_submission(root: str, address: str, *, competition: str) -> int:
    """Write the masks of a finished folder of labels as a .tgz in the server's layout; return their number.

    Each is results/VOC2012/Segmentation/COMPETITION_test_cls/KEY.png, a palette PNG of the image's own size. The competition
    is "comp5" for methods that saw VOC's own data alone and "comp6" for all others, hence for everything that starts from CLIP.
    The same folder gives the same bytes.

    Raises:
        ValueError: no finished labels, images without a mask, or masks with 255, which the server counts as wrong.
    """
    if competition not in COMPETITIONS:
        raise ValueError(f"competition is {competition!r}, allowed are {', '.join(COMPETITIONS)}")
    index = read_label_index(root)
    if index["num_rejects"]:
        raise ValueError(
            f"{root}: {index['num_rejects']} images have no mask, and the server wants one of each"
            f" ({index['reject_reasons']})"
        )
    if index["void_pixels"]:
        raise ValueError(f"{root} has {index['void_pixels']} pixels of 255; label with label.min_confidence=0")
    storage.write_atomic(address, lambda file: _write(file, _members(root, index, competition)))
    return int(index["num_samples"])


def _members(root: str, index: dict[str, Any], competition: str) -> Iterator[tuple[str, bytes]]:
    folder = f"results/VOC2012/Segmentation/{competition}_test_cls"
    for _, sample in samples_of(root, index):
        yield f"{folder}/{sample.key}.{MASK_EXTENSION}", sample.image


def _write(file: BinaryIO, members: Iterator[tuple[str, bytes]]) -> None:
    """A tar without times and owners in a gzip without time and name."""
    with (
        gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, data in members:
            add_member(tar, name, data)
