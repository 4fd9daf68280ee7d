"""Image-level labels as users have them: text and CSV/JSON-lines tables, VOC's XML, masks (only when asked for).

What is wrong with one image (an unknown class, no label) is a `LabelProblem` and rejects that image; what is wrong with
a whole file (no such column, a line that is not JSON) is a ValueError.
"""

import csv
import io
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dfa.data import storage
from dfa.data.classes import ClassSet, nearest

#: How a label file names classes: by name, or by index with the first foreground class 0 or 1.
LabelKind = Literal["names", "index_from_0", "index_from_1"]
LABEL_KINDS: tuple[LabelKind, ...] = ("names", "index_from_0", "index_from_1")

#: How every reason starts that means nothing but "this image has no label".
NO_LABEL = "no image-level label"

# VOC's largest annotation is some 20 kB; a gigabyte of XML is no annotation.
_MAX_XML_BYTES = 4 * 2**20


@dataclass(frozen=True)
class LabelProblem:
    """Why an image has no usable labels."""

    reason: str


#: Ascending unique class indices 1..C, or the problem.
Labels = tuple[int, ...] | LabelProblem


def check_label_kind(kind: str) -> None:
    """Raise a ValueError unless `kind` is one of LABEL_KINDS."""
    if kind not in LABEL_KINDS:
        raise ValueError(f"label_kind is {kind!r}; allowed: {LABEL_KINDS}; nearest: {nearest(kind, LABEL_KINDS)!r}")


def class_index(value: Any, *, classes: ClassSet, kind: LabelKind) -> int:
    """Return the index 1..C that one entry of a label file means.

    Raises:
        ValueError: unknown name (with the nearest known), or an index out of range.
    """
    if kind == "names":
        return classes.index(str(value).strip())
    first = 0 if kind == "index_from_0" else 1
    text = str(value).strip()
    if not text.isdecimal():
        raise ValueError(f"label {text!r} is no class index; with class names set label_kind to 'names'")
    if not first <= int(text) < first + classes.num_classes:
        raise ValueError(f"class index {text} is outside {first}..{first + classes.num_classes - 1}")
    return int(text) + 1 - first


def _parse(values: Iterable[Any], *, classes: ClassSet, kind: LabelKind, where: str) -> Labels:
    try:
        indices = {class_index(value, classes=classes, kind=kind) for value in values}
    except ValueError as error:
        return LabelProblem(f"{error} ({where})")
    return tuple(sorted(indices)) if indices else LabelProblem(f"{NO_LABEL} ({where} lists none)")


def read_label_text(address: str, *, classes: ClassSet, kind: LabelKind) -> dict[str, Labels]:
    """Read lines of `id class class ...`, separated by blanks; empty lines and lines that start with # are skipped.

    Returns:
        Labels by id (an image extension on the id is dropped).

    Raises:
        ValueError: an id that occurs twice, with both line numbers.
    """
    table: dict[str, Labels] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(_read_text(address).splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        key = strip_image_extension(words[0])
        if key in table:
            raise ValueError(f"{address} lists {key!r} twice, in lines {lines[key]} and {number}")
        lines[key] = number
        table[key] = _parse(words[1:], classes=classes, kind=kind, where=f"{address} line {number}")
    return table


def read_label_table(
    address: str, *, classes: ClassSet, kind: LabelKind, image_column: str, label_column: str, separator: str
) -> dict[str, Labels]:
    """Read a .csv, .tsv or .jsonl table with an image and a label column.

    A label cell holds one or more labels split by `separator`; in JSON lines it may be a list as well. Several rows of
    one image are merged, since one row per object is common.

    Returns:
        Labels by image as written in the table (forward slashes, without a leading `./`).

    Raises:
        ValueError: unknown file extension, missing column, or a broken line.
    """
    table: dict[str, Labels] = {}
    for number, image, values in _labelled_rows(address, image_column, label_column, separator):
        labels = _parse(values, classes=classes, kind=kind, where=f"{address} line {number}")
        table[image] = _merge(table[image], labels) if image in table else labels
    return table


def table_names(address: str, *, image_column: str, label_column: str, separator: str) -> tuple[str, ...]:
    """Return all names in the label column of a table, sorted; arguments and errors as in `read_label_table`."""
    rows = _labelled_rows(address, image_column, label_column, separator)
    return tuple(sorted({str(value).strip() for _, _, values in rows for value in values}))


def _labelled_rows(
    address: str, image_column: str, label_column: str, separator: str
) -> Iterator[tuple[int, str, list[Any]]]:
    """Yield (line number, image, entries of the label cell)."""
    for number, row in _rows(address):
        for column in (image_column, label_column):
            if column not in row:
                raise ValueError(
                    f"{address} line {number} has no column {column!r}; it has {list(row)}; "
                    f"nearest: {nearest(column, map(str, row))!r}; the first line of a .csv or .tsv names its columns, and"
                    " data.image_column and data.label_column may name others than image and labels"
                )
        image = str(row[image_column]).strip().replace("\\", "/").removeprefix("./")
        cell = row[label_column]
        values = cell if isinstance(cell, list) else ("" if cell is None else str(cell)).split(separator)
        yield number, image, [value for value in values if str(value).strip()]


def _merge(first: Labels, second: Labels) -> Labels:
    if isinstance(first, LabelProblem):
        return first
    if isinstance(second, LabelProblem):
        return second
    return tuple(sorted({*first, *second}))


def _rows(address: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row) of a table; the header of a CSV is line 1."""
    extension = address.rsplit(".", 1)[-1].lower()
    text = _read_text(address)
    if extension in ("csv", "tsv"):
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="," if extension == "csv" else "\t")
        header = list(reader.fieldnames or ())
        if len(header) == 1 and any(mark in header[0] for mark in ",;\t"):
            raise ValueError(
                f"{address} line 1 has one column, {header[0]!r}: a .csv is separated by commas and a .tsv by tabs; write it anew"
            )
        for row in reader:
            if None in row:  # else the labels behind the last column would be lost without a word
                raise ValueError(
                    f"{address} line {reader.line_num} has more cells than the header's {header}; a name with a"
                    " comma needs quotes, and several labels of an image belong into one cell, joined by data.separator, or into"
                    " several lines"
                )
            yield reader.line_num, dict(row)
    elif extension in ("jsonl", "ndjson"):
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield number, _json_object(line, f"{address} line {number}")
    else:
        raise ValueError(f"label table {address} must end in .csv, .tsv, .jsonl or .ndjson")


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object: {line[:80]!r}")
    return row


def _read_text(address: str) -> str:
    if not storage.exists(address):
        raise ValueError(f"no label file {address}")
    try:
        return storage.read_bytes(address).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"label file {address} is not UTF-8 text: {error}") from error


def strip_image_extension(name: str) -> str:
    """Return `name` without .jpg, .jpeg or .png at its end; other dots belong to the name."""
    stem, dot, extension = name.rpartition(".")
    return stem if dot and extension.lower() in ("jpg", "jpeg", "png") else name


def read_voc_annotation(address: str, *, classes: ClassSet, keep_difficult: bool) -> Labels:
    """Read the classes of the objects in one PASCAL VOC XML file (parts of objects are not objects).

    Args:
        address: the file.
        classes: the class list.
        keep_difficult: count objects marked `difficult`; the field does.
    """
    if not storage.exists(address):
        return LabelProblem(f"{NO_LABEL} (no annotation {address})")
    if storage.size_bytes(address) > _MAX_XML_BYTES:
        return LabelProblem(f"annotation {address} is larger than {_MAX_XML_BYTES} bytes")
    data = storage.read_bytes(address)
    # No annotation declares a document type; refusing them rules out entity expansion and external entities.
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        return LabelProblem(f"annotation {address} declares a document type")
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        return LabelProblem(f"annotation {address} is not valid XML: {error}")
    names = [
        item.findtext("name", default="")
        for item in root.findall("object")
        if keep_difficult or item.findtext("difficult", default="0").strip() != "1"
    ]
    return _parse(names, classes=classes, kind="names", where=address)


def labels_in_mask(mask_HW: npt.NDArray[np.uint8 | np.uint16]) -> Labels:
    """Return the foreground classes that occur in a mask (void is none)."""
    present = np.flatnonzero(np.bincount(mask_HW.reshape(-1))[: np.iinfo(mask_HW.dtype).max])
    labels = tuple(int(index) for index in present if index > 0)
    return labels or LabelProblem(f"{NO_LABEL} (the mask has no foreground)")
