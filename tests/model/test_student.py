"""The student holds what is trained and joins decoder and affinities."""

import pytest
import torch

from dfa.clip import load_clip
from dfa.core.affinity import PairLogit, inverse_attention, pair_channels
from dfa.model.decoder import Decoder
from dfa.model.student import Student

GRID = (2, 3)


def student(source="attention", token_blocks=3, attention_blocks=2):
    torch.manual_seed(0)
    decoder = Decoder(
        num_blocks=token_blocks, token_width=8, num_classes=2, width=8, depth=1, heads=2, mlp_ratio=2.0, dropout=0.0,
        normalize_tokens=True,
    )  # fmt: skip
    features = token_blocks if source == "attention+features" else 0
    low, high = (
        PairLogit(attention_blocks + features, hidden=4, clip=5.0, prior=prior, num_feature_channels=features)
        for prior in ("low", "high")
    )
    made = Student(decoder, low, high, source=source)
    for pair in (made.low, made.high):  # their last layers start at zero and would hide the channels
        torch.nn.init.normal_(pair.last.weight)
    return made


def inputs(token_blocks=3, attention_blocks=2):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, token_blocks, 6, 8, generator=generator)
    return tokens, torch.randn(2, attention_blocks, 6, 6, generator=generator).softmax(-1)


@pytest.mark.parametrize("source", ["attention", "attention+features"])
def test_each_band_reads_its_own_channels(source):
    made, (tokens, attention) = student(source), inputs()
    outputs = made(tokens, attention, GRID)
    for logit, pair, weight in (
        (outputs.low_logit_BNN, made.low, attention),
        (outputs.high_logit_BNN, made.high, inverse_attention(attention)),
    ):
        torch.testing.assert_close(logit, pair(pair_channels(weight, tokens, source=source)))
    fused, logits = made.decoder(tokens, GRID)
    assert torch.equal(outputs.fused_BDhw, fused) and torch.equal(outputs.logits_BChw, logits)
    assert torch.equal(made.segment(tokens, GRID), logits)
    low, high = made.pair_logits(tokens, attention)
    assert torch.equal(low, outputs.low_logit_BNN) and torch.equal(high, outputs.high_logit_BNN)
    with torch.no_grad():  # another way to the same
        for logit, expected in zip(made.pair_logits(tokens, attention), (low, high), strict=True):
            torch.testing.assert_close(logit, expected.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("source", ["attention", "attention+features"])
def test_unlearned_logits_are_those_of_the_first_step_whatever_was_learned(source):
    made, (tokens, attention) = student(source), inputs()
    for pair in (made.low, made.high):
        torch.nn.init.zeros_(pair.last.weight)
    expected = [each.detach() for each in made.pair_logits(tokens, attention)]
    with torch.no_grad():
        for parameter in (*made.low.parameters(), *made.high.parameters()):
            parameter.add_(0.3)
    for actual, wanted, learned in zip(
        made.unlearned_logits(tokens, attention), expected, made.pair_logits(tokens, attention), strict=True
    ):
        torch.testing.assert_close(actual, wanted)
        assert (actual - learned).abs().max() > 0.1 and not actual.requires_grad


def test_every_parameter_is_in_one_group_and_gets_a_gradient():
    made, (tokens, attention) = student("attention+features"), inputs()
    groups = made.parameter_groups()
    assert list(groups) == ["decoder", "affinity"]
    grouped = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in made.parameters())
    outputs = made(tokens, attention, GRID)
    (
        outputs.logits_BChw.square().sum()
        + outputs.low_logit_BNN.square().sum()
        + outputs.high_logit_BNN.square().sum()
    ).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in made.parameters())


def test_state_has_no_frozen_weights_and_fits_what_the_encoder_gives():
    clip = load_clip("conf/tiny_clip.json", "random", device="cpu", precision="fp32")
    image = torch.zeros(1, 3, 16, 24, dtype=torch.uint8)
    features = clip.encode(image, None, token_blocks=4, attention_blocks=2, similarity="raw", surgery_blocks=0)
    decoder = Decoder(
        num_blocks=4, token_width=clip.width, num_classes=2, width=8, depth=1, heads=2, mlp_ratio=2.0, dropout=0.0,
        normalize_tokens=True,
    )  # fmt: skip
    pairs = [PairLogit(2, hidden=4, clip=5.0, prior=prior) for prior in ("low", "high")]
    made = Student(decoder, *pairs, source="attention")
    assert made(features.tokens_BLND, features.attention_BLNN, features.grid).logits_BChw.shape == (1, 3, 2, 3)
    assert {name.split(".")[0] for name in made.state_dict()} == {"decoder", "low", "high"}
