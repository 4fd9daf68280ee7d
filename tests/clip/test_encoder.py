"""The frozen pass against open_clip itself, transformers, and slow float64 re-derivations."""

import math

import pytest
import torch
import torch.nn.functional as F

from dfa.clip import FrozenClip, WordTokenizer, build_clip, load_clip, value_embedding
from tests.clip.models import (
    WORDS,
    assert_relative,
    bank,
    load,
    normalized,
    picture,
    transformers_copy,
    write_model,
)

VARIANTS = {
    "plain": ({}, {}),
    "quickgelu": ({"quick_gelu": True}, {}),
    "layer_scale": ({}, {"ls_init_value": 0.5}),
    "no_ln_pre": ({}, {"no_ln_pre": True}),
}
EVERY = {"token_blocks": 3, "attention_blocks": 3, "surgery_blocks": 2}


@pytest.fixture
def clip(tmp_path):
    return load(write_model(tmp_path))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("similarity", ["raw", "value", "surgery"])
def test_tokens_and_class_embedding_equal_open_clips_own_forward(tmp_path, variant, similarity):
    clip = load(write_model(tmp_path, *VARIANTS[variant]))
    image, text = picture(), bank(clip)
    got = clip.encode(image, text, **EVERY, similarity=similarity)
    own = clip.visual.forward_intermediates(normalized(image).float(), output_fmt="NLC")
    assert_relative(got.tokens_BLND, torch.stack(own["image_intermediates"], dim=1))
    assert_relative(got.class_similarity_BK, F.normalize(own["image_features"], dim=-1) @ text.T)


@pytest.mark.parametrize("token_blocks, attention_blocks", [(0, 0), ((0, 1), 2), ((1,), (0, 2))])
@pytest.mark.parametrize("similarity", ["raw", "value", "surgery"])
def test_choosing_fewer_blocks_changes_nothing_else(clip, token_blocks, attention_blocks, similarity):
    full = clip.encode(picture(), bank(clip), **EVERY, similarity=similarity)
    chosen = {"token_blocks": token_blocks, "attention_blocks": attention_blocks}
    part = clip.encode(picture(), bank(clip), **chosen, similarity=similarity, surgery_blocks=2)
    at = [list(range(3 - blocks, 3)) if isinstance(blocks, int) else list(blocks) for blocks in chosen.values()]
    assert_relative(part.similarity_BNK, full.similarity_BNK)
    assert_relative(part.class_similarity_BK, full.class_similarity_BK)
    torch.testing.assert_close(part.tokens_BLND, full.tokens_BLND[:, at[0]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(part.attention_BLNN, full.attention_BLNN[:, at[1]], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("activation, top", [("gelu", {}), ("quick_gelu", {"quick_gelu": True})])
@pytest.mark.parametrize("height, width", [(32, 32), (48, 24)])
def test_tokens_and_attention_equal_transformers_clip(tmp_path, activation, top, height, width):
    clip = load(write_model(tmp_path, top))
    image, text = picture(2, height, width), bank(clip)
    with torch.no_grad():
        theirs = transformers_copy(clip, activation)(
            normalized(image).float(),
            output_attentions=True, output_hidden_states=True, interpolate_pos_encoding=True,
        )  # fmt: skip
    got = clip.encode(image, text, **EVERY, similarity="raw", keep_heads=True)
    assert got.grid == (height // 8, width // 8)
    assert_relative(got.tokens_BLND, torch.stack(theirs.hidden_states[1:], dim=1)[:, :, 1:])
    attention = torch.stack(theirs.attentions, dim=1)[..., 1:, 1:]
    assert_relative(got.attention_BLNN, attention.flatten(1, 2))
    mean = clip.encode(image, text, **EVERY, similarity="raw")
    assert_relative(mean.attention_BLNN, attention.mean(2))
    assert_relative(got.class_similarity_BK, F.normalize(theirs.image_embeds, dim=-1) @ text.T)


def slow_surgery(visual, image, text, num_blocks):
    """One image, float64, every head and every query by itself."""
    weights = {name: value.double() for name, value in visual.state_dict().items()}

    def norm(x, name):
        return F.layer_norm(x, (x.shape[-1],), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def attend(first, second, value):
        mixed = torch.zeros_like(value)
        for head in range(2):
            part = slice(16 * head, 16 * head + 16)
            for query in range(len(value)):
                row = torch.stack([first[query, part] @ second[other, part] for other in range(len(value))])
                mixed[query, part] = torch.softmax(row / math.sqrt(16), dim=0) @ value[:, part]
        return mixed

    patches = F.conv2d(normalized(image)[None], weights["conv1.weight"], stride=8)[0].flatten(1).T
    x = norm(torch.cat([weights["class_embedding"][None], patches]) + weights["positional_embedding"], "ln_pre")
    second = None
    for block in range(3):
        name = f"transformer.resblocks.{block}"
        packed = (
            norm(x, f"{name}.ln_1") @ weights[f"{name}.attn.in_proj_weight"].T + weights[f"{name}.attn.in_proj_bias"]
        )
        q, k, v = packed.split(32, dim=1)
        out_weight, out_bias = weights[f"{name}.attn.out_proj.weight"].T, weights[f"{name}.attn.out_proj.bias"]
        if block >= 3 - num_blocks:
            mixed = (attend(q, q, v) + attend(k, k, v) + attend(v, v, v)) / 3
            second = (x if second is None else second) + mixed @ out_weight + out_bias
        x = x + attend(q, k, v) @ out_weight + out_bias
        hidden = norm(x, f"{name}.ln_2") @ weights[f"{name}.mlp.c_fc.weight"].T + weights[f"{name}.mlp.c_fc.bias"]
        x = x + F.gelu(hidden) @ weights[f"{name}.mlp.c_proj.weight"].T + weights[f"{name}.mlp.c_proj.bias"]
        value = v
    raw = norm(x, "ln_post")
    surgery, value = norm(second, "ln_post"), norm(value @ out_weight + out_bias, "ln_post")
    cosine = [F.normalize(y[1:] @ weights["proj"], dim=-1) @ text.double().T for y in (raw, value, surgery)]
    return dict(zip(("raw", "value", "surgery"), cosine, strict=True))


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_raw_value_and_surgery_equal_a_slow_float64_derivation(clip, num_blocks):
    # Biases are zero in fresh weights: an error in them would not show.
    generator = torch.Generator().manual_seed(4)
    for parameter in clip.visual.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    image, text = picture(1), bank(clip)
    slow = slow_surgery(clip.visual, image[0], text, num_blocks)
    for similarity, expected in slow.items():
        got = clip.encode(
            image, text, token_blocks=0, attention_blocks=0, similarity=similarity, surgery_blocks=num_blocks
        )
        assert_relative(got.similarity_BNK[0], expected)


def test_value_embedding_carries_gradients(tmp_path):
    visual = build_clip(write_model(tmp_path)).visual
    value_embedding(visual, torch.randn(1, 5, 32)).sum().backward()
    assert visual.transformer.resblocks[-1].attn.out_proj.weight.grad.abs().sum() > 0


def test_positional_embedding_is_untouched_at_the_native_grid_and_kept_per_grid(clip):
    assert clip._position((4, 4)) is clip.visual.positional_embedding
    other = clip._position((5, 3))
    assert other.shape == (16, 32) and clip._position((5, 3)) is other
    for rows in range(6, 50):
        clip._position((rows, 2))
    assert len(clip._positions) <= 32


def test_float_images_and_bytes_give_the_same(clip):
    image, text = picture(), bank(clip)
    as_float = clip.encode(image / 255, text, **EVERY, similarity="surgery")
    assert_relative(as_float.similarity_BNK, clip.encode(image, text, **EVERY, similarity="surgery").similarity_BNK)


def test_renormalized_rows_sum_to_one(clip):
    got = clip.encode(picture(), None, **EVERY, similarity="raw", keep_heads=True, renormalize_rows=True)
    torch.testing.assert_close(got.attention_BLNN.sum(-1), torch.ones(2, 6, 16))  # 3 blocks x 2 heads
    assert clip.encode(picture(), None, **EVERY, similarity="raw").attention_BLNN.sum(-1).max() < 1


def test_without_a_text_bank_the_similarity_is_empty(clip):
    got = clip.encode(picture(), None, token_blocks=(0,), attention_blocks=0, similarity="surgery", surgery_blocks=2)
    assert got.similarity_BNK.shape == (2, 16, 0) and got.class_similarity_BK.shape == (2, 0)
    assert got.attention_BLNN.shape == (2, 0, 16, 16)


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.05), ("fp16", 0.01)])
def test_half_precision_stays_near_fp32(tmp_path, precision, tolerance, quick_gelu):
    # 8 and 11 bits of mantissa through three blocks; outputs other than tokens are fp32 in any case.
    path, image = write_model(tmp_path, {"quick_gelu": quick_gelu}), picture()
    full, half = load(path), load(path, precision=precision)
    text = bank(full)
    expected, got = (clip.encode(image, text, **EVERY, similarity="surgery") for clip in (full, half))
    assert got.similarity_BNK.dtype == got.attention_BLNN.dtype == torch.float32
    assert got.tokens_BLND.dtype == half.dtype
    assert (got.similarity_BNK - expected.similarity_BNK).abs().max() < tolerance


def test_nothing_is_trained_and_nothing_is_registered(clip):
    holder = torch.nn.Module()
    holder.clip = clip
    assert not list(holder.parameters()) and not holder.state_dict()
    assert not any(parameter.requires_grad for parameter in clip.clip.parameters()) and not clip.clip.training
    got = clip.encode(picture().float().div(255).requires_grad_(), bank(clip), **EVERY, similarity="surgery")
    assert not got.tokens_BLND.requires_grad and not got.similarity_BNK.requires_grad
    torch.nn.Linear(32, 2)(got.tokens_BLND).sum().backward()  # usable in a graph, unlike inference-mode tensors


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": picture(1, 33, 32)}, "33 x 32.*8 x 8"),
        ({"image": picture(1, 32, 4)}, "32 x 4.*8 x 8"),
        ({"image": picture(1)[0]}, "expected .batch, 3"),
        ({"token_blocks": 4}, "token_blocks 4.*3 blocks"),
        ({"attention_blocks": (2, 1)}, "attention_blocks"),
        ({"similarity": "dense"}, "dense.*raw, value, surgery"),
        ({"surgery_blocks": 9}, r"surgery_blocks 9.*1\.\.3"),
        ({"text": torch.zeros(2, 7)}, "expected .columns, 24"),
    ],
)
def test_bad_requests_are_told(clip, change, message):
    request = {"image": picture(1), "text": bank(clip), "similarity": "surgery"} | EVERY | change
    image, text = request.pop("image"), request.pop("text")
    with pytest.raises(ValueError, match=message):
        clip.encode(image, text, **request)


def test_text_bank_is_the_mean_of_normalized_embeddings_in_any_order(clip, monkeypatch):
    prompts, templates = [["dog"], ["cat", "red cat", "tree"]], ["a photo of {}", "{}"]
    expected = []
    for column in prompts:
        texts = [template.format(prompt) for prompt in column for template in templates]
        rows = [F.normalize(clip.clip.encode_text(clip.tokenizer(text))[0], dim=0) for text in texts]
        expected.append(F.normalize(sum(rows) / len(rows), dim=0))
    got = clip.text_bank(prompts, templates)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert clip.text_bank(prompts, templates) is got
    monkeypatch.setattr("dfa.clip.text._TEXT_CHUNK", 3)
    shuffled = clip.text_bank([["tree", "cat", "red cat"], ["dog"]], templates[::-1])
    torch.testing.assert_close(shuffled.flip(0), got, rtol=1e-5, atol=1e-6)


def test_text_bank_refuses_empty_columns_and_bad_templates(clip):
    with pytest.raises(ValueError, match=r"columns \[1\]"):
        clip.text_bank([["dog"], []], ["{}"])
    with pytest.raises(ValueError, match="a photo"):
        clip.text_bank([["dog"]], ["a photo"])


def test_word_tokenizer_ends_with_the_largest_id_and_survives_long_text():
    tokenizer = WordTokenizer(WORDS, context_length=6)
    ids = tokenizer(["A red-dog, zebra", "tree " * 9, ""])
    assert ids.tolist() == [[9, 2, 5, 6, 1, 10], [9, 8, 8, 8, 8, 10], [9, 10, 0, 0, 0, 0]]
    assert tokenizer.vocab_size == 11 == len(WORDS) + 4
    with pytest.raises(ValueError, match="Dog"):
        WordTokenizer(["Dog"], 6)


def test_text_embedding_does_not_depend_on_what_follows_the_end(clip):
    ids = clip.tokenizer("red dog")
    padded = ids.clone()
    padded[0, 4:] = 3
    torch.testing.assert_close(clip.clip.encode_text(padded), clip.clip.encode_text(ids))


@pytest.mark.parametrize("vision", [{"pool_type": "avg"}, {"attentional_pool": True}, {"qk_norm": True}])
def test_towers_that_are_not_read_here_are_refused(tmp_path, vision):
    with pytest.raises(ValueError, match="not supported"):
        load(write_model(tmp_path, vision=vision))


def test_a_model_description_without_its_parts_is_refused(tmp_path):
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(ValueError, match="text_cfg"):
        build_clip(tmp_path / "model.json")


def test_a_json_without_vocabulary_uses_open_clips_tokenizer(tmp_path):
    clip = load(write_model(tmp_path, vocabulary=False))
    assert isinstance(clip, FrozenClip) and clip.text_bank([["dog"]], ["a {}."]).shape == (1, 24)


@pytest.mark.long
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_compiled_layers_give_the_same_and_are_compiled_once_for_all_blocks_and_sizes(tmp_path, quick_gelu):
    path = write_model(tmp_path, top={"quick_gelu": quick_gelu})
    plain, compiled = load(path), load_clip(path, "random", device="cpu", precision="fp32", seed=3, compiled=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"token_blocks": 2, "attention_blocks": 2, "similarity": "surgery", "surgery_blocks": 2}
    for batch, height, width in ((2, 32, 32), (3, 48, 40), (2, 24, 64), (2, 40, 40)):
        image = picture(batch, height, width)
        found, wanted = (each.encode(image, bank(each), **options) for each in (compiled, plain))
        for name in ("tokens_BLND", "attention_BLNN", "similarity_BNK", "class_similarity_BK"):
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name), atol=1e-5, rtol=1e-5)
    # Two functions, which may be compiled anew for the one row that leaves the last block: not for each block, nor each size.
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
