"""Pairs of small maps on disk in all forms, and slow numbers from numpy alone."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from dfa.analysis.maps import MapLimits
from dfa.analysis.sums import AnalysisSettings
from dfa.data.planning import plan_shards, write_plan
from dfa.data.samples import MaskFile, Sample
from dfa.data.writer import finish, write_shard

NAMES = ("cat", "dog")
SETTINGS = AnalysisSettings(MapLimits(num_classes=3, max_pixels=10_000), nu_max=5, boundary=True)
SIZES = ((24, 32), (17, 21), (30, 20))


def truth_of(number):
    """Blocks of classes 0..2 with some void."""
    rng = np.random.default_rng(number)
    height, width = SIZES[number % len(SIZES)]
    coarse = rng.choice([0, 0, 1, 2, 255], (4, 5)).astype(np.uint8)
    return coarse[(np.arange(height) * 4 // height)[:, None], np.arange(width) * 5 // width]


def prediction_of(number):
    """The truth, a few pixels aside, without void."""
    moved = np.roll(truth_of(number), (1, 2), (0, 1))
    return np.where(moved == 255, 0, moved).astype(np.uint8)


def logits_of(number):
    noise = np.random.default_rng(100 + number).normal(size=(3, *truth_of(number).shape))
    return (noise + 3 * (np.arange(3)[:, None, None] == prediction_of(number))).astype(np.float32)


def write_pngs(folder: Path, maps) -> str:
    for key, mask_HW in maps.items():
        path = folder / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask_HW).save(path)
    return str(folder)


def write_arrays(folder: Path, maps, *, suffix=".npy") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for key, found in maps.items():
        if suffix == ".npz":
            np.savez_compressed(folder / f"{key}.npz", logits=found)
        else:
            np.save(folder / f"{key}.npy", found)
    return str(folder)


def write_images(root: Path, truths, *, per_shard=4, with_masks=True):
    source = root.parent / f"{root.name}-source"
    source.mkdir(parents=True)
    samples = []
    for key, mask_HW in truths.items():
        Image.fromarray(np.zeros((*mask_HW.shape, 3), np.uint8)).save(source / f"{key}.jpg")
        Image.fromarray(mask_HW).save(source / f"{key}.png")
        mask = MaskFile(str(source / f"{key}.png")) if with_masks else None
        samples.append(Sample(key, str(source / f"{key}.jpg"), (1,), mask))
    plan = plan_shards(samples, class_names=NAMES, seed=0, shuffle=True, samples_per_shard=per_shard, max_pixels=10_000)
    write_plan(str(root), plan)
    for item in plan.items:
        write_shard(str(root), item)
    return finish(str(root), plan, max_reject_share=0.0)


def slow_band(x_HW, y_HW, nu_max):
    """`sum over |ny|, |nx| <= k of Re conj(x) y`, bin by bin."""
    x, y = (np.fft.fft2(each.astype(np.float64), norm="ortho") for each in (x_HW, y_HW))
    ny, nx = (np.abs(np.fft.fftfreq(size) * size).round() for size in x_HW.shape)
    ring = np.maximum(ny[:, None], nx[None, :])
    return np.array([(x.conj() * y).real[ring <= k].sum() for k in range(nu_max + 1)])


def png_bytes(mask_HW):
    file = io.BytesIO()
    Image.fromarray(mask_HW).save(file, "PNG")
    return file.getvalue()
