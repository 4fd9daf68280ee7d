import math
from itertools import product

import pytest
import torch
from scipy.stats import linregress, spearmanr
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dfa.core.analysis.cost import (
    DROP_LIMIT,
    best_grid,
    deeplab_decoder_flops,
    deeplab_decoder_parameters,
    estimated_drop,
    flops_per_iou,
    recommended_grid,
    spearman,
    truncated_flops,
    vit_flops,
)
from dfa.core.analysis.truncation import block_annotation, resize_features
from tests.core.analysis.printed import GFLOPS, GRIDS, LOSS_RATES, SCORES


def deeplab_decoder(num_classes):
    """Chen et al. 2018: low-level features to 48 channels, two 3 x 3 convolutions, the classifier."""
    return nn.ModuleList(
        [
            nn.Sequential(nn.Conv2d(256, 48, 1, bias=False), nn.BatchNorm2d(48)),
            nn.Sequential(nn.Conv2d(304, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256)),
            nn.Sequential(nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256)),
            nn.Conv2d(256, num_classes, 1),
        ]
    )


@pytest.mark.parametrize("num_classes", [7, 21])
def test_the_deeplab_decoder_is_counted_as_it_is_built(num_classes):
    built = deeplab_decoder(num_classes)
    assert sum(weight.numel() for weight in built.parameters()) == deeplab_decoder_parameters(num_classes)
    weights = [part.weight for part in built.modules() if isinstance(part, nn.Conv2d)]
    assert deeplab_decoder_flops(129, num_classes=num_classes) == 2 * 129**2 * sum(each.numel() for each in weights)


def test_the_printed_cost_of_the_deeplab_decoder_is_reproduced():
    assert round(deeplab_decoder_flops(129, num_classes=7) / 1e9, 1) == 43.4
    assert round(deeplab_decoder_parameters(7) / 1e6, 3) == 1.305


@pytest.mark.parametrize(("model", "decoder"), [("deeplab", 43.41), ("dan", 11.1)])
def test_the_unpruned_rows_of_table_2_are_reproduced_exactly(model, decoder):
    row = [round(truncated_flops(95.6, decoder, grid=grid, full_grid=129)) for grid in GRIDS]
    assert row == GFLOPS[model][0]


def printed_points():
    return [
        (rate, drop / 100)
        for model, data in product(LOSS_RATES, LOSS_RATES["dan"])
        for row in SCORES[model][data]
        for rate, (_, drop) in zip(LOSS_RATES[model][data], row, strict=True)
    ]


def test_the_refit_of_the_printed_tables_gives_the_known_line():
    rates, drops = zip(*((rate, drop) for rate, drop in printed_points() if rate < DROP_LIMIT), strict=True)
    line = linregress(rates, drops)
    # METHOD 3 states three digits.
    assert abs(line.slope - 0.740) < 5e-4 and abs(line.intercept + 0.0006) < 1e-4 and abs(line.rvalue**2 - 0.900) < 5e-4


# Rows where the rounding of table 2 leaves no doubt.
@pytest.mark.parametrize(
    ("model", "data", "row", "grid"),
    [("deeplab", "pascal", 0, 33), ("deeplab", "deepglobe", 3, 17), ("dan", "cityscapes", 0, 97)],
)
def test_the_grid_of_least_fpi_is_the_one_that_the_paper_marks(model, data, row, grid):
    flops = dict(zip(GRIDS, GFLOPS[model][row], strict=True))
    miou = dict(zip(GRIDS, (score for score, _ in SCORES[model][data][row]), strict=True))
    assert best_grid(flops, miou) == grid
    assert flops_per_iou(flops[grid], miou[grid]) == min(flops[each] / miou[each] for each in GRIDS)


def test_the_estimate_is_the_published_line_where_it_was_fitted():
    assert math.isclose(estimated_drop(0.1), 0.06945) and math.isnan(estimated_drop(0.2))


def test_the_recommended_grid_passes_together_with_every_larger_one():
    rates = dict(zip(GRIDS, LOSS_RATES["deeplab"]["pascal"], strict=True))
    assert recommended_grid(rates, max_drop=0.02) == 49 and recommended_grid(rates, max_drop=0.03) == 33
    assert recommended_grid(rates, max_drop=0.001) is None
    assert recommended_grid(rates | {65: 0.15}, max_drop=0.03) == 81
    assert recommended_grid({9: 0.9, 33: 0.01}, max_drop=0.5) == 33  # no estimate is made for 9


def test_impossible_choices_are_refused():
    with pytest.raises(ValueError, match=r"FLOPs of the grids \[17\] and mIoU of \[33\]"):
        best_grid({17: 1.0}, {33: 0.5})
    with pytest.raises(ValueError, match="mIoU above 0, got 0"):
        flops_per_iou(1.0, 0)


@pytest.mark.parametrize("size", [(513, 513), (7, 12), (375, 500), (1, 30)])
@pytest.mark.parametrize("grid", [1, 5, 17, 33, 512, 513, 600])
def test_block_annotation_takes_the_label_at_the_centre_of_each_block(size, grid):
    label = torch.arange(size[0] * size[1]).view(1, *size)
    found = block_annotation(label, grid=grid)
    from_pixel = []
    for length in size:
        blocks = [(2 * i + 1) * grid // (2 * length) for i in range(length)]
        from_pixel.append(
            [(2 * block + 1) * length // (2 * grid) if grid < length else i for i, block in enumerate(blocks)]
        )
    for y, x in [(0, 0), (size[0] - 1, size[1] - 1), (size[0] // 2, size[1] // 3)]:
        assert found[0, y, x] == from_pixel[0][y] * size[1] + from_pixel[1][x]
    assert found.unique().numel() == min(grid, size[0]) * min(grid, size[1])
    assert torch.equal(block_annotation(found, grid=grid), found)  # once is enough
    if grid >= max(size):
        assert torch.equal(found, label)


def test_blocks_keep_void_and_the_type():
    label = torch.full((4, 4), 255, dtype=torch.uint8)
    label[:2] = 3
    found = block_annotation(label, grid=2)
    assert found.dtype == torch.uint8 and torch.equal(found, label)
    with pytest.raises(ValueError, match="at least one block"):
        block_annotation(label, grid=0)


def test_features_are_resized_at_cell_centres():
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    torch.testing.assert_close(resize_features(ramp, (4, 4))[0, 0, 0], torch.tensor([0.5, 2.5, 4.5, 6.5]))
    assert resize_features(ramp, (8, 8)) is ramp


@pytest.mark.parametrize("seed", range(4))
def test_rank_correlation_equals_that_of_scipy(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, generator=generator, dtype=torch.float64)
    y = x + seed * torch.randn(12, generator=generator, dtype=torch.float64)
    if seed > 1:
        x, y = x.round(), y.round()  # ties
    assert math.isclose(spearman(x.tolist(), y.tolist()), spearmanr(x, y).statistic, rel_tol=1e-12)


def test_rank_correlation_of_too_little_is_refused_or_undefined():
    assert math.isnan(spearman([1, 2, 3], [5, 5, 5]))
    for x, y in (([1], [2]), ([1, 2], [1, 2, 3])):
        with pytest.raises(ValueError, match=f"two equally long lists .* got {len(x)} and {len(y)}"):
            spearman(x, y)


@pytest.mark.parametrize("mlp_ratio", [4.0, 2.0])
def test_the_cost_of_a_vit_is_what_torch_counts(mlp_ratio):
    width, patch_size, side, layers = 32, 8, 6, 2
    embed = nn.Conv2d(3, width, patch_size, patch_size)
    projections = [nn.Linear(width, width) for _ in range(4)]
    mlp = [nn.Linear(width, int(mlp_ratio * width)), nn.Linear(int(mlp_ratio * width), width)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        patches = embed(torch.zeros(1, 3, side * patch_size, side * patch_size)).flatten(2).mT
        x = torch.cat([patches[:, :1], patches], dim=1)
        for _ in range(layers):
            query, key, value = (each(x) for each in projections[:3])
            x = projections[3](torch.bmm(torch.bmm(query, key.mT).softmax(-1), value))
            x = mlp[1](mlp[0](x))
    sizes = {"patch_size": patch_size, "width": width, "layers": layers, "mlp_ratio": mlp_ratio}
    assert vit_flops(side**2, **sizes) == counter.get_total_flops()
