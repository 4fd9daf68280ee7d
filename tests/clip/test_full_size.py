"""ViT-B/16 at its full size with random weights, against open_clip, transformers and a float64 derivation."""

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F

from dfa import config as configuration
from dfa.build.data import class_set
from tests.clip.models import assert_relative, bank, load, normalized, picture, transformers_copy

pytestmark = pytest.mark.full_size
MODEL = "ViT-B-16-quickgelu"
EVERY = {"token_blocks": 12, "attention_blocks": 12, "surgery_blocks": 5}


@pytest.fixture(scope="module")
def clip():
    clip = load(MODEL)
    generator = torch.Generator().manual_seed(4)
    for parameter in clip.clip.parameters():  # fresh biases are zero: an error in them would not show
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return clip


@pytest.fixture(scope="module")
def native(clip):
    """Everything of one picture of 224 x 224, as the tower was made for."""
    image = picture(1, 224, 224)
    return image, clip.encode(image, bank(clip), **EVERY, similarity="surgery", keep_heads=True)


def test_tokens_and_class_embedding_equal_open_clips(clip, native):
    image, got = native
    own = clip.visual.forward_intermediates(normalized(image).float(), output_fmt="NLC")
    assert_relative(got.tokens_BLND, torch.stack(own["image_intermediates"], dim=1))
    assert_relative(got.class_similarity_BK, F.normalize(own["image_features"], dim=-1) @ bank(clip).T)


def test_tokens_and_attention_of_every_head_equal_transformers(clip, native):
    image, got = native
    with torch.no_grad():
        theirs = transformers_copy(clip, "quick_gelu")(
            normalized(image).float(), output_attentions=True, output_hidden_states=True
        )
    assert_relative(got.tokens_BLND, torch.stack(theirs.hidden_states[1:], dim=1)[:, :, 1:])
    assert_relative(got.attention_BLNN, torch.stack(theirs.attentions, dim=1)[..., 1:, 1:].flatten(1, 2))


def test_attention_of_every_head_equals_open_clips_own_modules(clip, native):
    image, got = native
    blocks, entering = clip.visual.transformer.resblocks, []
    hooks = [block.attn.register_forward_pre_hook(lambda _, given: entering.append(given[0])) for block in blocks]
    with torch.no_grad():
        clip.visual(normalized(image).float())
        for hook in hooks:
            hook.remove()
        weights = [
            block.attn(x, x, x, need_weights=True, average_attn_weights=False)[1]
            for block, x in zip(blocks, entering, strict=True)
        ]
    assert_relative(got.attention_BLNN, torch.stack(weights, dim=1)[..., 1:, 1:].flatten(1, 2))


@pytest.mark.parametrize(("height", "width"), [(320, 320), (160, 384)])
def test_at_other_sizes_tokens_and_attention_equal_transformers(clip, height, width):
    """Not open_clip: its resizing of positions is antialiased, ours, as theirs, is not."""
    image = picture(1, height, width)
    got = clip.encode(image, None, **EVERY, similarity="raw", keep_heads=True)
    with torch.no_grad():
        theirs = transformers_copy(clip, "quick_gelu")(
            normalized(image).float(),
            output_attentions=True,
            output_hidden_states=True,
            interpolate_pos_encoding=True,
        )
    assert_relative(got.tokens_BLND, torch.stack(theirs.hidden_states[1:], dim=1)[:, :, 1:])
    assert_relative(got.attention_BLNN, torch.stack(theirs.attentions, dim=1)[..., 1:, 1:].flatten(1, 2))


def test_vit_large_of_patch_14_equals_both_libraries():
    clip, image = load("ViT-L-14-quickgelu"), picture(1, 224, 224)
    got = clip.encode(
        image, bank(clip), token_blocks=24, attention_blocks=8, similarity="raw", surgery_blocks=0, keep_heads=True
    )
    assert got.grid == (16, 16) and got.tokens_BLND.shape[1:] == (24, 256, 1024)
    own = clip.visual.forward_intermediates(normalized(image).float(), output_fmt="NLC")
    assert_relative(got.tokens_BLND, torch.stack(own["image_intermediates"], dim=1))
    assert_relative(got.class_similarity_BK, F.normalize(own["image_features"], dim=-1) @ bank(clip).T)
    with torch.no_grad():
        theirs = transformers_copy(clip, "quick_gelu")(normalized(image).float(), output_attentions=True)
    assert_relative(got.attention_BLNN, torch.stack(theirs.attentions[-8:], dim=1)[..., 1:, 1:].flatten(1, 2))


def float64_surgery(visual, image, text):
    """The cosines of one image in float64, block after block, as CLIP Surgery is written down."""

    def weight(name):
        return visual.state_dict()[name].double()

    def norm(x, name):
        return F.layer_norm(x, (768,), weight(f"{name}.weight"), weight(f"{name}.bias"))

    def attend(first, second, value):
        mixed = torch.empty_like(value)
        for head in range(12):
            part = slice(64 * head, 64 * head + 64)
            mixed[:, part] = torch.softmax(first[:, part] @ second[:, part].T / math.sqrt(64), dim=1) @ value[:, part]
        return mixed

    height, width = image.shape[1] // 16, image.shape[2] // 16
    positions = weight("positional_embedding")
    square = positions[1:].T.reshape(1, 768, 14, 14)
    square = F.interpolate(square, size=(height, width), mode="bicubic", align_corners=False)
    patches = F.conv2d(normalized(image)[None], weight("conv1.weight"), stride=16)[0].flatten(1).T
    x = torch.cat([(weight("class_embedding") + positions[0])[None], patches + square[0].flatten(1).T])
    x = norm(x, "ln_pre")
    second = None
    for block in range(12):
        name = f"transformer.resblocks.{block}"
        packed = norm(x, f"{name}.ln_1") @ weight(f"{name}.attn.in_proj_weight").T + weight(f"{name}.attn.in_proj_bias")
        q, k, v = packed.split(768, dim=1)
        out, bias = weight(f"{name}.attn.out_proj.weight").T, weight(f"{name}.attn.out_proj.bias")
        if block >= 12 - 5:
            mixed = (attend(q, q, v) + attend(k, k, v) + attend(v, v, v)) / 3
            second = (x if second is None else second) + mixed @ out + bias
        x = x + attend(q, k, v) @ out + bias
        hidden = norm(x, f"{name}.ln_2") @ weight(f"{name}.mlp.c_fc.weight").T + weight(f"{name}.mlp.c_fc.bias")
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        x = x + hidden @ weight(f"{name}.mlp.c_proj.weight").T + weight(f"{name}.mlp.c_proj.bias")
    return F.normalize(norm(second[1:], "ln_post") @ weight("proj"), dim=-1) @ text.double().T


def test_surgery_equals_a_float64_derivation_at_another_image_size(clip):
    image, text = picture(1, 64, 96), bank(clip)
    got = clip.encode(image, text, token_blocks=0, attention_blocks=0, similarity="surgery", surgery_blocks=5)
    assert got.grid == (4, 6)
    assert_relative(got.similarity_BNK[0], float64_surgery(clip.visual, image[0], text))


def test_text_features_of_the_published_prompts_equal_open_clips(clip):
    config = configuration.Config()
    classes = class_set(config)
    assert classes.templates == ("a clean origami {}.",) and len(classes.background) == 25
    assert classes.prompts[2] == ("bird avian",) and classes.background[0] == "ground"
    chosen = [classes.prompts[2], ("person", "man"), (classes.background[0],)]
    templates = (*classes.templates, "a photo of a {}.")
    tokenizer, expected = open_clip.get_tokenizer(MODEL), []
    for column in chosen:
        sentences = [template.format(prompt) for prompt in column for template in templates]
        rows_PE = clip.clip.encode_text(tokenizer(sentences), normalize=True)
        expected.append(F.normalize(rows_PE.mean(0), dim=0))
    assert_relative(clip.text_bank(chosen, templates), torch.stack(expected))
