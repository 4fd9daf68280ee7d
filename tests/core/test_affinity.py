import pytest
import torch
from torch import nn

from dfa.core.affinity import (
    PairLogit,
    both_logits,
    inverse_attention,
    pair_channels,
    sinkhorn_normalize,
    symmetric_affinity,
)


def attention(images=2, blocks=3, patches=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(images, blocks, patches, patches, generator=generator), -1)


def order(values):
    return values.flatten().argsort(stable=True)


def test_inverse_attention_is_the_row_wise_all_pass_minus_the_row():
    """METHOD 1.3: the all-pass of a filter centred at query i is the transform of the delta at i."""
    weight = attention()
    patches = weight.shape[-1]
    inverse = torch.empty_like(weight)
    for query in range(patches):
        delta = torch.zeros(patches)
        delta[query] = 1
        spectrum = torch.fft.fft(delta) - torch.fft.fft(weight[..., query, :])
        inverse[..., query, :] = torch.fft.ifft(spectrum).real
    torch.testing.assert_close(inverse_attention(weight), inverse, atol=1e-6, rtol=0)
    assert inverse_attention(weight).min() < 0
    torch.testing.assert_close(weight, attention())  # The argument is left alone.


def test_sinkhorn_equals_alternate_division_and_ends_on_rows():
    weight = attention()[:, 0].double()
    expected = weight.clone()
    for _ in range(3):
        for image in range(2):
            for column in range(12):
                expected[image, :, column] /= expected[image, :, column].sum()
            for row in range(12):
                expected[image, row] /= expected[image, row].sum()
    actual = sinkhorn_normalize(weight, rounds=3)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(actual.sum(-1), torch.ones(2, 12, dtype=torch.float64))


def test_symmetric_affinity_is_symmetric_and_nearly_doubly_stochastic():
    affinity = symmetric_affinity(attention()[:, 0], rounds=30)
    assert torch.equal(affinity, affinity.mT)
    # Thirty rounds on a 12 x 12 matrix of softmax entries leave less than 1e-5.
    torch.testing.assert_close(affinity.sum(-1), torch.ones(2, 12), atol=1e-4, rtol=0)


def test_normalisation_keeps_fp32_under_autocast():
    weight = attention()[:, 0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn_normalize(weight, rounds=3), sinkhorn_normalize(weight.float(), rounds=3))
    assert sinkhorn_normalize(weight, rounds=3).dtype == torch.float32
    torch.testing.assert_close(sinkhorn_normalize(weight, rounds=3).sum(-1), torch.ones(2, 12), atol=1e-6, rtol=0)


def test_feature_channels_are_cosines_of_centred_tokens():
    weight, tokens = attention(), torch.randn(2, 3, 12, 5) + 4
    channels = pair_channels(weight, tokens, source="attention+features")
    assert channels.shape == (2, 6, 12, 12)
    assert torch.equal(channels[:, :3], weight)
    for image in range(2):
        for block in range(3):
            centred = (tokens[image, block] - tokens[image, block].mean(0)).double()
            for i in range(12):
                cosine = torch.cosine_similarity(centred[i], centred, dim=-1)
                torch.testing.assert_close(channels[image, 3 + block, i].double(), cosine, atol=1e-6, rtol=0)
    assert torch.equal(pair_channels(weight, None, source="attention"), weight)
    with pytest.raises(ValueError, match="needs tokens_BLND"):
        pair_channels(weight, None, source="attention+features")
    with pytest.raises(ValueError, match="source must be"):
        pair_channels(weight, None, source="features")


def test_the_low_prior_is_the_mean_attention_and_normalises_to_the_unlearned_affinity():
    weight = attention()
    module = PairLogit(3, hidden=4, clip=8.0, prior="low")
    logit = module(weight)
    mean = weight.mean(1)
    unlearned = 0.5 * (mean + mean.mT)
    torch.testing.assert_close(module.positive(logit), 12 * unlearned, atol=1e-6, rtol=1e-5)
    assert torch.equal(logit, logit.mT)
    torch.testing.assert_close(
        symmetric_affinity(module.positive(logit), rounds=3),
        symmetric_affinity(unlearned, rounds=3),
        atol=1e-6,
        rtol=1e-5,
    )


def test_the_high_prior_keeps_the_order_of_the_inverse_attention():
    weight = attention(images=1)
    module = PairLogit(3, hidden=4, clip=8.0, prior="high")
    logit = module(inverse_attention(weight))
    mean = inverse_attention(weight).mean(1)
    unlearned = 0.5 * (mean + mean.mT)
    inside = (12 * unlearned).abs() < 8.0
    assert inside.float().mean() > 0.8
    assert torch.equal(order(module.positive(logit)[inside]), order(unlearned[inside]))
    assert (logit.diagonal(dim1=1, dim2=2).amin() > logit[~torch.eye(12, dtype=torch.bool)[None]].amax()).all()


def test_a_high_map_may_start_where_the_low_one_does():
    weight = attention()
    low, high = (PairLogit(3, hidden=4, clip=8.0, prior=prior) for prior in ("low", "high_as_low"))
    torch.testing.assert_close(high(inverse_attention(weight)), low(weight), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for logit in both_logits(low, high, weight, None):
            torch.testing.assert_close(logit, low(weight), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="prior must be one of"):
        PairLogit(3, hidden=4, clip=8.0, prior="middle")


def test_a_pair_that_attends_to_nothing_stays_finite():
    weight = torch.eye(6).expand(1, 2, 6, 6)
    for prior in ("low", "high"):
        channels = weight if prior == "low" else inverse_attention(weight)
        module = PairLogit(2, hidden=3, clip=5.0, prior=prior)
        logit = module(channels)
        logit.sum().backward()
        assert logit.isfinite().all() and logit.abs().max() <= 5.0
        assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("features", [0, 2])
@pytest.mark.parametrize("chunk", [7, 16_384])
def test_logit_and_gradients_equal_plain_convolutions(features, chunk, monkeypatch):
    monkeypatch.setattr("dfa.core.affinity._CHUNK_CPU", chunk)
    torch.manual_seed(0)
    weight = attention(blocks=4)
    channels = torch.cat([weight, 2 * torch.rand(2, features, 12, 12) - 1], dim=1)
    module = PairLogit(4 + features, hidden=5, clip=3.0, prior="low", num_feature_channels=features)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    upstream = torch.randn(2, 12, 12)
    (module(channels) * upstream).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    actual = module(channels).detach()
    module.zero_grad()

    scaled = torch.cat([12 * channels[:, :4], channels[:, 4:]], 1).clamp(-3, 3)
    hidden = nn.functional.conv2d(scaled, module.first.weight[:, :, None, None], module.first.bias).relu()
    output = nn.functional.conv2d(hidden, module.last.weight[:, :, None, None])[:, 0]
    mean = 12 * channels[:, :4].mean(1)
    expected = module.scale * torch.log(0.5 * (mean + mean.mT)).clamp(-3, 3) + module.bias + 0.5 * (output + output.mT)
    if features:
        cosine = channels[:, 4:].mean(1)
        expected = expected + module.scale * module.gain * 0.5 * (cosine + cosine.mT)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    (expected * upstream).sum().backward()
    for name, parameter in module.named_parameters():
        # Sums over 288 pairs in another order.
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-3, rtol=1e-4, msg=name)


@pytest.mark.parametrize("clip", [0.4, 3.0])
@pytest.mark.parametrize("features", [0, 2])
@pytest.mark.parametrize("chunk", [7, 16_384])
def test_both_logits_at_once_equal_each_module_on_its_own_channels(features, chunk, clip, monkeypatch):
    monkeypatch.setattr("dfa.core.affinity._CHUNK_CPU", chunk)
    torch.manual_seed(0)
    weight, tokens = attention(), torch.randn(2, 2, 12, 5)
    low, high = (
        PairLogit(3 + features, hidden=5, clip=clip, prior=prior, num_feature_channels=features)
        for prior in ("low", "high")
    )
    for parameter in (*low.parameters(), *high.parameters()):
        nn.init.normal_(parameter)
    source = "attention+features" if features else "attention"
    actual = both_logits(low, high, weight, tokens if features else None)
    for pair, logit, read in zip((low, high), actual, (weight, inverse_attention(weight)), strict=True):
        torch.testing.assert_close(logit, pair(pair_channels(read, tokens, source=source)).detach(), atol=1e-5, rtol=0)
        assert torch.equal(logit, logit.mT)


def test_both_logits_refuse_modules_and_channels_that_do_not_fit():
    low, high = (PairLogit(3, hidden=4, clip=5.0, prior=prior) for prior in ("low", "high"))
    with pytest.raises(ValueError, match="2 pair channels given, 3 and 3 expected"):
        both_logits(low, high, attention(blocks=2), None)
    with pytest.raises(ValueError, match="0 feature channels expected"):
        both_logits(low, high, attention(), torch.randn(2, 1, 12, 5))
    with pytest.raises(ValueError, match="one clip"):
        both_logits(low, PairLogit(3, hidden=4, clip=4.0, prior="high"), attention(), None)


def test_the_zero_initialised_layer_learns_from_step_zero():
    torch.manual_seed(0)
    module = PairLogit(3, hidden=4, clip=5.0, prior="low")
    weight, target = attention(), torch.rand(2, 12, 12)
    target = (target + target.mT > 1).float()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.03)
    losses = []
    for step in range(60):
        loss = nn.functional.binary_cross_entropy_with_logits(module(weight), target)
        optimizer.zero_grad()
        loss.backward()
        assert step > 0 or module.last.weight.grad.abs().max() > 0
        optimizer.step()
        losses.append(loss.item())
    assert module.last.weight.abs().min() > 0
    assert losses[-1] < losses[0] - 0.05


def test_half_precision_weights_and_autocast_give_fp32_logits():
    weight = attention()
    module = PairLogit(3, hidden=4, clip=5.0, prior="low")
    expected = module(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(weight), expected)
    half = PairLogit(3, hidden=4, clip=5.0, prior="low").bfloat16()
    logit = half(weight.bfloat16())
    logit.sum().backward()
    assert logit.dtype == torch.float32 and half.last.weight.grad.dtype == torch.bfloat16


def test_wrong_channels_are_refused():
    module = PairLogit(3, hidden=4, clip=5.0, prior="low")
    with pytest.raises(ValueError, match="2 pair channels given, 3 expected"):
        module(attention(blocks=2))
    with pytest.raises(ValueError, match="leave none for the attention"):
        PairLogit(3, hidden=4, clip=5.0, prior="low", num_feature_channels=3)
