"""The decoder against torch's own transformer layer and a slow re-derivation."""

import pytest
import torch
import torch.nn.functional as F

from dfa.model.decoder import Decoder
from dfa.model.mixer import AttentionBlock

SMALL = {"num_blocks": 2, "token_width": 12, "num_classes": 3, "width": 16, "depth": 2, "heads": 4, "mlp_ratio": 2.0}


def small(dropout=0.5, normalize_tokens=True, seed=0):
    torch.manual_seed(seed)
    return Decoder(**SMALL, dropout=dropout, normalize_tokens=normalize_tokens)


def test_attention_block_equals_torchs_pre_norm_layer():
    torch.manual_seed(0)
    block = AttentionBlock(16, heads=4, mlp_ratio=2.0)
    layer = torch.nn.TransformerEncoderLayer(
        16, 4, dim_feedforward=32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    pairs = {
        "norm1": block.norm_1,
        "norm2": block.norm_2,
        "self_attn.out_proj": block.project,
        "linear1": block.mlp[0],
        "linear2": block.mlp[2],
    }
    state = {f"{name}.{kind}": value for name, part in pairs.items() for kind, value in part.state_dict().items()}
    state["self_attn.in_proj_weight"] = block.query_key_value.weight
    state["self_attn.in_proj_bias"] = block.query_key_value.bias
    layer.load_state_dict(state)
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(block(x, (1, 7)), layer(x))


@pytest.mark.parametrize("normalize_tokens", [True, False])
def test_decoder_equals_its_definition(normalize_tokens):
    decoder = small(normalize_tokens=normalize_tokens).eval()
    tokens = 3 + 5 * torch.randn(2, 2, 12, 12)
    fused, logits = decoder(tokens, (3, 4))
    assert fused.shape == (2, 16, 3, 4) and logits.shape == (2, 4, 3, 4)
    parts = []
    for index, mlp in enumerate(decoder.reduce):
        x = tokens[:, index]
        if normalize_tokens:
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        parts.append(F.relu(x @ mlp[0].weight.T + mlp[0].bias) @ mlp[2].weight.T + mlp[2].bias)
    expected = torch.cat(parts, -1) @ decoder.fuse.weight.T + decoder.fuse.bias
    for row in range(3):  # row-major grid
        for column in range(4):
            torch.testing.assert_close(fused[:, :, row, column], expected[:, 4 * row + column])
    x = expected
    for block in decoder.blocks:
        x = block(x, (3, 4))
    torch.testing.assert_close(logits.flatten(2).mT, x @ decoder.classify.weight.T + decoder.classify.bias)


def test_fused_feature_is_taken_before_the_dropout():
    decoder, tokens = small(dropout=0.5), torch.randn(2, 2, 6, 12)
    (first, first_logits), (second, second_logits) = decoder.train()(tokens, (2, 3)), decoder(tokens, (2, 3))
    assert torch.equal(first, second) and not torch.equal(first_logits, second_logits)
    assert torch.equal(first, decoder.eval()(tokens, (2, 3))[0])


@pytest.mark.parametrize("num_blocks, expected", [(11, 5_985_045), (12, 6_313_237)])
def test_parameters_at_vit_b16_are_the_published_six_million(num_blocks, expected):
    with torch.device("meta"):
        decoder = Decoder(
            num_blocks=num_blocks, token_width=768, num_classes=20, width=256, depth=3, heads=8, mlp_ratio=4.0,
            dropout=0.1, normalize_tokens=True,
        )  # fmt: skip
    assert sum(parameter.numel() for parameter in decoder.parameters()) == expected


def test_half_precision_tokens_meet_the_decoders_own_precision():
    decoder, tokens = small().eval(), torch.randn(1, 2, 6, 12).half()
    assert torch.equal(decoder(tokens, (2, 3))[1], decoder(tokens.float(), (2, 3))[1])
    assert decoder.bfloat16()(tokens, (2, 3))[1].dtype == torch.bfloat16


def test_wrong_tokens_are_told():
    with pytest.raises(ValueError, match=r"\(1, 2, 5, 12\).*\(any, 2, 6, 12\).*2 x 3"):
        small()(torch.randn(1, 2, 5, 12), (2, 3))
    with pytest.raises(ValueError, match="16 is not a multiple of 3"):
        AttentionBlock(16, heads=3, mlp_ratio=2.0)
