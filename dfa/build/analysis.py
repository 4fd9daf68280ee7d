"""What the spectral analysis compares, and what truncated decoders cost."""

from collections.abc import Sequence
from pathlib import Path

import torch

from dfa.analysis.maps import MapLimits, MapSet, find_maps
from dfa.analysis.summary import TruncationCosts
from dfa.analysis.sums import AnalysisSettings
from dfa.build.data import class_set
from dfa.build.model import beside_conf, decoder_of, num_token_blocks
from dfa.clip import vision_size_of
from dfa.config import Config
from dfa.core.analysis.cost import deeplab_decoder_flops, vit_flops
from dfa.data import storage

_DEEPLAB_ENCODER, _DEEPLAB_GRID = 95.6e9, 129  # of the spectral analysis, table 2: images of 513 x 513


def analysis_settings(config: Config) -> AnalysisSettings:
    """How pairs are summed.

    Raises:
        ValueError: analyze.grids has what no band is resolved by.
    """
    if wrong := [grid for grid in config.analyze.grids if grid < 3 or grid % 2 == 0]:
        raise ValueError(
            f"analyze.grids has {wrong[0]}, allowed are odd numbers of cells from 3 on: 2 nu_max + 1 resolve nu_max cycles"
        )
    limits = MapLimits(len(class_set(config).names) + 1, config.data.max_pixels)
    return AnalysisSettings(limits, config.analyze.nu_max, config.analyze.boundary)


def analysis_pairs(config: Config) -> tuple[MapSet, MapSet]:
    """Predictions and ground truth: analyze.prediction, and analyze.truth or the validation shards."""
    num_classes = len(class_set(config).names) + 1
    truth = config.analyze.truth or config.shards.val
    return (
        find_maps(config.analyze.prediction, field="analyze.prediction", num_classes=num_classes),
        find_maps(truth, field="analyze.truth", num_classes=num_classes),
    )


def analysis_output(config: Config) -> str:
    """analyze.output, or RUN/analysis/NAME of the predictions."""
    name = storage.base_name(config.analyze.prediction)
    return config.analyze.output or storage.join(config.run, f"analysis/{name}")


def truncation_costs(config: Config, grids: Sequence[int]) -> tuple[TruncationCosts, ...]:
    """Of this configuration's model on a square crop, and of DeepLabv3+ on 513 x 513 pixels, on those of `grids` that are
    smaller than their own."""
    num_classes = len(class_set(config).names)
    vision = vision_size_of(beside_conf(config.clip.model))
    full = config.crop.size // vision.patch_size
    smaller = [grid for grid in grids if grid < full]
    encoder = vit_flops(
        full**2,
        patch_size=vision.patch_size,
        width=vision.width,
        layers=vision.layers,
        mlp_ratio=vision.mlp_ratio,
    )
    num_tokens = num_token_blocks(config)

    def flops(grid: int) -> float:
        with torch.device("meta"):  # sizes alone, no weights
            decoder = decoder_of(config, vision.width, num_tokens, num_classes, grid_share=grid / full)
        return float(decoder.flops((full, full)))

    theirs = {
        grid: float(deeplab_decoder_flops(grid, num_classes=num_classes + 1))
        for grid in [_DEEPLAB_GRID, *(grid for grid in grids if grid < _DEEPLAB_GRID)]
    }
    name = f"decoder on {Path(config.clip.model).stem}, {config.crop.size} pixels"
    return (
        TruncationCosts(name, encoder, {grid: flops(grid) for grid in [full, *smaller]}, full),
        TruncationCosts("DeepLabv3+, 513 pixels", _DEEPLAB_ENCODER, theirs, _DEEPLAB_GRID),
    )
