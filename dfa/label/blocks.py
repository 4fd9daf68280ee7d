"""Block-wise annotation on disk: ground truth of image shards, or a folder of PNG masks, at the resolution of a grid (METHOD 3).

From shards come label shards (see `dfa.label.output`), which training reads with loss.supervision=labels; they are made of
ground truth, so such a training is not one from image-level labels. The same masks and grid give the same bytes, and what
was committed is not done again.
"""

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from dfa.core.analysis.truncation import block_annotation
from dfa.core.void import void_label
from dfa.data import storage
from dfa.data.classes import voc_palette
from dfa.data.folder import image_names
from dfa.data.samples import check_mask_values
from dfa.data.shards import RawSample, SampleRow, ShardIndex, read_shard
from dfa.data.transforms import LabelArray, decode_mask, encode_mask
from dfa.label.claim import Claim, UnwritableError
from dfa.label.images import ShardFile, problem_of
from dfa.label.output import (
    LabelItem,
    LabelRecord,
    LabelReject,
    LabelReport,
    commit,
    committed,
    describe,
    finish,
    judge,
)
from dfa.label.scoring import Agreement, LabelSettings, Tally

logger = logging.getLogger(__name__)

_NO_MASK = "the image shard holds no mask of it"


def block_mask(mask_HW: LabelArray, grid: int) -> LabelArray:
    """`block_annotation` of one mask (H, W)."""
    return block_annotation(torch.from_numpy(mask_HW.astype(np.int32)), grid=grid).numpy().astype(mask_HW.dtype)


def write_block_labels(index: ShardIndex, output: str, *, grid: int, max_pixels: int) -> LabelReport:
    """Label shards with the block-wise masks of image shards, `grid` blocks along each axis.

    Raises:
        ValueError: shards without masks or that have changed, or a folder of other content or that cannot be written.
    """
    settings = LabelSettings(len(index.class_names), crf=None, sharpness=1.0, min_confidence=0.0, thresholds=())
    common = hashlib.sha256(f"blocks {grid} {max_pixels}".encode()).hexdigest()
    items = [_item(shard.name, shard.sha256, shard.num_samples, common) for shard in index.shards]
    claim = Claim(output, index.class_names, common, index.plan_hash)
    with claim.held():
        todo = [item for item in items if committed(output, item, settings) is None]
        if todo:
            claim.reopen()
        for number, item in enumerate(todo, 1):
            _write_shard(index, output, item, settings, grid, max_pixels)
            logger.info("%s: %d samples, %d of %d shards", item.shard, item.num_rows, number, len(todo))
        report = finish(output, items, index.class_names, index.plan_hash, settings)
    if not report.num_samples:
        raise ValueError(f"{index.root} holds no usable masks: {report.rejects[0].reason}; shard it with data.masks")
    return report


def _item(shard: str, sha256: str, num_rows: int, common: str) -> LabelItem:
    return LabelItem(shard, sha256, num_rows, hashlib.sha256(f"{common} {shard} {num_rows}".encode()).hexdigest())


def _write_shard(
    index: ShardIndex, output: str, item: LabelItem, settings: LabelSettings, grid: int, max_pixels: int
) -> None:
    start_s, records, rejects = time.process_time(), list[LabelRecord](), list[LabelReject]()
    tally = Tally.zero(settings)
    for found in _labelled(index, item.shard, grid, max_pixels):
        if isinstance(found, LabelReject):
            rejects.append(found)
            continue
        record, mask_HW = found
        records.append(record)
        tally = tally + _counted(mask_HW, settings)
    if problem := problem_of(ShardFile(index.path(item.shard), item.image_sha256), item.image_sha256):
        raise ValueError(problem)
    commit(output, item, settings, records, rejects, tally, {"blocks": time.process_time() - start_s})


def _labelled(
    index: ShardIndex, shard: str, grid: int, max_pixels: int
) -> Iterator[tuple[LabelRecord, LabelArray] | LabelReject]:
    palette, void = voc_palette(), void_label(len(index.class_names))
    for raw in read_shard(index.path(shard)):
        try:
            if raw.mask is None:
                raise ValueError(_NO_MASK)
            truth_HW = decode_mask(raw.mask, max_pixels=max_pixels)
            check_mask_values(truth_HW, num_classes=len(index.class_names), where=f"{shard}, key {raw.key!r}")
        except ValueError as error:
            yield LabelReject(raw.key, str(error))
            continue
        mask_HW = block_mask(truth_HW, grid)
        row, classes = _row(raw), [int(value) for value in np.unique(mask_HW) if value != void]
        kept = Agreement(float((mask_HW == truth_HW).mean()), None, None)
        note = describe(row, index.class_names, classes, mask_HW, 1.0)
        members = {"png": encode_mask(mask_HW, palette), "json": note}
        yield LabelRecord(members, judge(row, mask_HW, 1.0, kept)), mask_HW


def _row(raw: RawSample) -> SampleRow:
    return SampleRow(raw.key, raw.shard, raw.row, raw.labels, raw.width, raw.height, has_mask=True)


def _counted(mask_HW: LabelArray, settings: LabelSettings) -> Tally:
    void = void_label(settings.num_classes)
    pixels = torch.from_numpy(np.bincount(mask_HW.reshape(-1), minlength=void + 1))
    counted = pixels[: settings.num_classes + 1]
    return replace(Tally.zero(settings), num_images=1, void_pixels=int(pixels[void]), pixels_C=counted)


def write_block_pngs(source: str, output: str, *, grid: int, max_pixels: int) -> int:
    """The same of a local folder of PNG masks, under the same names in OUTPUT; return their number.

    A mask that is there with these bytes already is left alone.

    Raises:
        ValueError: no masks there, one that is none, or a folder that cannot be written.
    """
    names = [name for name in image_names(source)[0] if name.lower().endswith(".png")]
    if not names:
        raise ValueError(f"{source} holds no PNG masks")
    for name in names:
        path, address = os.path.join(source, name), storage.join(output, name)
        try:
            mask_HW = decode_mask(storage.read_bytes(path), max_pixels=max_pixels)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        data = encode_mask(block_mask(mask_HW, grid), voc_palette())
        try:
            storage.make_folder(address.rsplit("/", 1)[0])
            if not storage.exists(address) or storage.read_bytes(address) != data:
                storage.write_atomic(address, lambda file, data=data: file.write(data))
        except OSError as error:
            raise UnwritableError(f"block-wise masks cannot be written to {output}: {error}") from error
    return len(names)
