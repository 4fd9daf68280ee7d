"""SPANet's block against an implementation of sums alone, and the choice of mixers in the decoder."""

import math

import pytest
import torch

from dfa import build, config
from dfa.model.decoder import Decoder
from dfa.model.mixer import AttentionBlock, SpectralBlock, SpectralMixer, block_kinds


def randomised(block):
    """The block with every parameter drawn, so that nothing is hidden behind its zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return block


def fourier_matrix(size):
    place = torch.arange(size, dtype=torch.float64)
    return torch.exp(-2j * math.pi * place[:, None] * place[None] / size)


def slow_low_pass(x, radius):
    """Bins of an open disc kept, by matrices of exponentials."""
    height, width = x.shape[-2:]
    rows, columns = fourier_matrix(height), fourier_matrix(width)
    spectrum = rows @ x.to(torch.complex128) @ columns
    for k in range(height):
        for m in range(width):
            if min(k, height - k) ** 2 + min(m, width - m) ** 2 >= radius**2:
                spectrum[..., k, m] = 0
    return (rows.conj() @ spectrum @ columns.conj() / (height * width)).real


def slow_depth_wise(x, weight, bias):
    """Channel after channel, tap after tap, zeros around."""
    found = torch.zeros_like(x)
    taps_y, taps_x = weight.shape[-2:]
    height, width = x.shape[-2:]
    for channel in range(len(x)):
        found[channel] += bias[channel]
        for dy in range(taps_y):
            for dx in range(taps_x):
                y, z = dy - taps_y // 2, dx - taps_x // 2
                inside = (slice(max(0, -y), height - max(0, y)), slice(max(0, -z), width - max(0, z)))
                moved = (slice(max(0, y), height - max(0, -y)), slice(max(0, z), width - max(0, -z)))
                found[channel][inside] += weight[channel, 0, dy, dx] * x[channel][moved]
    return found


def slow_group_norm(x, norm):
    x = (x - x.mean()) / (x.var(correction=0) + norm.eps).sqrt()
    return x * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]


def slow_map(x, linear):
    return torch.einsum("oc,chw->ohw", linear.weight.double(), x) + linear.bias.double()[:, None, None]


def slow_block(block, x, radius):
    """One image, D x h x w, fp64 (METHOD 4)."""
    mixer = block.mixer
    value = slow_map(slow_group_norm(x, block.norm_1), mixer.value)
    local = slow_depth_wise(value, mixer.along_rows.weight.double(), mixer.along_rows.bias.double())
    local = slow_depth_wise(local, mixer.along_columns.weight.double(), mixer.along_columns.bias.double())
    context, first = torch.zeros_like(x) + mixer.context.bias.double()[:, None, None], 0
    width = len(x)
    for group, balance in enumerate((0.7, 0.8, 0.9)):
        size = width // 3 + (group < width % 3)
        chunk = local[first : first + size]
        filtered = (1 - balance) * chunk + (2 * balance - 1) * slow_low_pass(chunk, radius)
        context += torch.einsum("oc,chw->ohw", mixer.context.weight.double()[:, first : first + size], filtered)
        first += size
    x = block.scale_1.double()[:, None, None] * x + slow_map(value * context, mixer.project)
    hidden = slow_map(slow_group_norm(x, block.norm_2), block.mlp[0])
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return block.scale_2.double()[:, None, None] * x + slow_map(hidden, block.mlp[2])


@pytest.mark.parametrize("grid", [(14, 14), (20, 20), (21, 21), (28, 20), (1, 3)])
@pytest.mark.parametrize("radius", [1.0, 2.5])
def test_the_block_equals_an_implementation_of_sums(grid, radius):
    block = randomised(SpectralBlock(8, mlp_ratio=2.0, radius=radius, drop=0.0))
    x = torch.randn(2, grid[0] * grid[1], 8, generator=torch.Generator().manual_seed(0))
    found = block(x, grid)
    for image in range(2):
        expected = slow_block(block, x[image].double().T.unflatten(1, grid), radius)
        # fp32 against fp64.
        torch.testing.assert_close(found[image].T.unflatten(1, grid).double(), expected, atol=1e-5, rtol=1e-5)


def test_a_radius_of_one_pools_to_the_mean():
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(slow_low_pass(x, 1.0), x.mean((2, 3), keepdim=True).expand_as(x))


def test_the_block_has_the_parameters_of_the_paper():
    with torch.device("meta"):
        block = SpectralBlock(256, mlp_ratio=4.0, radius=2.0, drop=0.0)
    assert sum(parameter.numel() for parameter in block.parameters()) == 728_576
    assert "balance_D" not in block.mixer.state_dict()


def test_the_block_starts_as_the_identity_and_learns_from_there():
    block, x = SpectralBlock(12, mlp_ratio=2.0, radius=2.0, drop=0.0), torch.randn(2, 20, 12)
    assert torch.equal(block(x, (4, 5)), x)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(2):  # behind the zeros gradients arrive from the second step on
        optimizer.zero_grad()
        block(x, (4, 5)).square().sum().backward()
        optimizer.step()
    assert all(parameter.grad.abs().sum() > 0 for parameter in block.parameters())


def test_stochastic_depth_leaves_out_branches_of_whole_images_in_training_only():
    torch.manual_seed(0)
    block = randomised(SpectralBlock(6, mlp_ratio=2.0, radius=2.0, drop=0.5))
    with torch.no_grad():
        block.scale_1.fill_(1)
        block.mlp[2].weight.zero_()
        block.mlp[2].bias.zero_()
        block.scale_2.fill_(1)
    x = torch.randn(1, 12, 6).expand(64, -1, -1)
    branch = block.eval()(x, (3, 4))[0] - x[0]
    scales = ((block.train()(x, (3, 4)) - x) * branch).sum((1, 2)) / branch.square().sum()
    assert set(scales.round(decimals=3).tolist()) == {0.0, 2.0}


def test_the_transform_stays_in_fp32_under_autocast():
    mixer, x = randomised(SpectralMixer(9, radius=2.0)), torch.randn(1, 30, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mixer(x, (5, 6))
    assert found.isfinite().all()
    # bf16 has 8 bits; the entries are products of three maps of nine channels.
    torch.testing.assert_close(found.float(), mixer(x, (5, 6)), atol=0.5, rtol=0.05)


@pytest.mark.parametrize(("mixer", "kinds"), [("attention", "aaa"), ("spam", "sss"), ("hybrid", "ssa")])
def test_the_decoder_is_built_of_the_blocks_that_the_configuration_names(mixer, kinds):
    built = build.segmenter(
        config.load("demo", [f"decoder.mixer={mixer}", "decoder.depth=3", "decoder.radius=3"]), torch.device("cpu")
    )
    blocks = built.student.decoder.blocks
    assert ["a" if isinstance(block, AttentionBlock) else "s" for block in blocks] == list(kinds)
    assert all(block.mixer.band.value == 3 for block in blocks if isinstance(block, SpectralBlock))
    assert build.model_description(config.load("demo", [f"decoder.mixer={mixer}"]))["decoder"]["mixer"] == mixer


def small(**changes):
    torch.manual_seed(0)
    options = {
        "num_blocks": 2,
        "token_width": 12,
        "num_classes": 3,
        "width": 12,
        "depth": 2,
        "heads": 4,
        "mlp_ratio": 2.0,
    }
    return Decoder(**options, dropout=0.0, normalize_tokens=True, **changes).eval()


@pytest.mark.parametrize("mixer", ["attention", "hybrid"])
def test_truncated_features_go_through_the_blocks_on_the_smaller_grid(mixer):
    whole, truncated = small(mixer=mixer), small(mixer=mixer, grid_share=0.5)
    truncated.load_state_dict(whole.state_dict())
    tokens, grid = torch.randn(2, 2, 60, 12), (6, 10)
    fused, logits = truncated(tokens, grid)
    assert torch.equal(fused, whole(tokens, grid)[0])  # F_d stays where it is
    # Half of both sides: bilinear at the middle of four cells is their mean.
    x = torch.nn.functional.avg_pool2d(fused, 2).flatten(2).mT
    for block in whole.blocks:
        x = block(x, (3, 5))
    small_logits = whole.classify(x).mT.unflatten(2, (3, 5))
    expected = torch.nn.functional.interpolate(small_logits, size=grid, mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert small(grid_share=0.01).working_grid(grid) == (1, 1) and whole.working_grid(grid) == grid


def counted(decoder, grid):
    """Multiply-adds that modules and attention really do, by hooks."""
    total = []

    def linear(module, _, output):
        total.append(output.numel() * module.in_features)

    def convolution(module, _, output):
        total.append(output.numel() * module.weight[0].numel())

    for module in decoder.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(linear)
        elif isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(convolution)
    decoder(torch.randn(1, 2, grid[0] * grid[1], 12), grid)
    return 2 * sum(total)


@pytest.mark.parametrize("grid_share", [0.0, 0.5])
def test_operations_are_those_that_are_done(grid_share):
    grid = (6, 10)
    cells = 60 if not grid_share else 15
    attention = small(grid_share=grid_share)
    products = 2 * attention.blocks[0].heads * 2 * cells**2 * (12 // 4)  # queries by keys, weights by values
    assert attention.flops(grid) == counted(small(grid_share=grid_share), grid) + 2 * products
    spam = small(mixer="spam", grid_share=grid_share)
    transforms = round(5 * cells * math.log2(cells)) * 12
    assert spam.flops(grid) == counted(small(mixer="spam", grid_share=grid_share), grid) + 2 * transforms


def test_impossible_mixers_are_refused():
    with pytest.raises(ValueError, match="mixer must be attention, spam or hybrid, got 'conv'"):
        block_kinds("conv", 2)
    with pytest.raises(ValueError, match="a width of at least 3, got 2"):
        SpectralMixer(2, radius=1.0)
    with pytest.raises(ValueError, match="share of the patch grid's sides, from 0 to 1, got 2"):
        small(grid_share=2.0)
