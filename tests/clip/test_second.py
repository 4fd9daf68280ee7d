"""The second frozen encoder, against timm's own forward, and what its tokens do to the affinities."""

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from dfa import build
from dfa.build.model import assemble
from dfa.clip.second import load_vit
from dfa.config import load
from dfa.core.affinity import PairLogit, inverse_attention, pair_channels
from dfa.model.decoder import Decoder
from dfa.model.student import Student
from tests.clip.models import picture

NAME, CPU = "vit_tiny_patch16_224", torch.device("cpu")


def vit(checkpoint="random", num_blocks=2, precision="fp32", name=NAME, seed=0):
    return load_vit(name, checkpoint, num_blocks=num_blocks, device="cpu", precision=precision, seed=seed)


@pytest.fixture(scope="module")
def made():
    return vit()


@pytest.mark.parametrize("given", ["bytes", "floats"])
def test_the_tokens_are_timms_own_and_those_of_the_last_block_its_features(made, given):
    image = picture(2, 64, 96)
    model, normalized = made.model, (image / 255 - 0.5) / 0.5  # this model's mean and standard deviation
    tokens = made.tokens(image if given == "bytes" else image / 255, (4, 6))
    with torch.no_grad():
        own = model.forward_features(normalized)[:, 1:]
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(normalized))))
        for block in model.blocks[:-1]:
            x = block(x)
    assert tokens.shape == (2, 2, 24, 192)
    torch.testing.assert_close(tokens[:, 1], own)
    torch.testing.assert_close(tokens[:, 0], model.norm(x)[:, 1:])


def test_an_image_of_another_patch_size_is_resized_to_the_same_grid(made):
    image = picture(1, 48, 64)  # patches of 8: a grid of 6 x 8
    resized = F.interpolate(image / 255, (96, 128), mode="bilinear", antialias=True)
    torch.testing.assert_close(made.tokens(image, (6, 8)), made.tokens(resized, (6, 8)))


def test_it_is_frozen_follows_its_seed_and_has_half_precision(made):
    image = picture(1, 32, 32)
    assert not any(parameter.requires_grad for parameter in made.model.parameters())
    assert torch.equal(vit().tokens(image, (2, 2)), made.tokens(image, (2, 2)))
    assert not torch.equal(vit(seed=1).tokens(image, (2, 2)), made.tokens(image, (2, 2)))
    half = vit(precision="bf16").tokens(image, (2, 2))
    assert half.dtype == torch.bfloat16
    assert F.cosine_similarity(half.float(), made.tokens(image, (2, 2)), dim=-1).min() > 0.99


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_with_a_classifier_is_read_and_gives_the_models_tokens(tmp_path, suffix):
    torch.manual_seed(5)
    whole = timm.create_model(NAME)  # a thousand classes
    path = tmp_path / f"weights{suffix}"
    weights = {name: value.contiguous() for name, value in whole.state_dict().items()}
    safetensors.torch.save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    image = picture(1, 224, 224)
    expected = whole.eval().forward_features((image / 255 - 0.5) / 0.5)[:, 1:].detach()
    torch.testing.assert_close(vit(str(path), num_blocks=1).tokens(image, (14, 14))[:, 0], expected)


def test_weights_of_another_vit_are_told(tmp_path):
    other = timm.create_model(NAME, depth=3, num_classes=0).state_dict()
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file(other, path)
    with pytest.raises(ValueError, match=r"other\.safetensors does not fit affinity\.encoder vit_tiny.*blocks\.10"):
        vit(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "vit_tiny_patch16_225"}, "no model of timm; the nearest ViT is 'vit_tiny_patch16_224'"),
        ({"name": "resnet18"}, "is no ViT"),
        (
            {"name": "vit_tiny_patch16_224.augreg_in22k"},
            "no such weights; the nearest is 'vit_tiny_patch16_224.augreg_in21k'",
        ),
        ({"num_blocks": 13}, "has 12 blocks, the last 13"),
        ({"checkpoint": "weights/none.pth"}, "pretrained, random and the path of a file"),
        ({"precision": "fp8"}, "precision 'fp8'"),
    ],
)
def test_bad_requests_are_told(change, message):
    with pytest.raises(ValueError, match=message):
        vit(**change)


def test_without_a_network_the_file_to_fetch_and_the_way_out_are_named(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"timm/vit_base_patch16_224\.dino.*affinity\.encoder_checkpoint=weights/FILE"):
        vit("pretrained", name="vit_base_patch16_224.dino")


@pytest.mark.parametrize("source", ["attention", "attention+features"])
def test_its_cosines_are_channels_of_their_own_behind_those_of_clip(source):
    torch.manual_seed(0)
    tokens, second = torch.randn(2, 3, 6, 8), torch.randn(2, 2, 6, 20)
    attention = torch.randn(2, 4, 6, 6).softmax(-1)
    features = 2 + (3 if source == "attention+features" else 0)
    pairs = [
        PairLogit(4 + features, hidden=4, clip=5.0, prior=prior, num_feature_channels=features)
        for prior in ("low", "high")
    ]
    for pair in pairs:  # their last layers start at zero and would hide the channels
        torch.nn.init.normal_(pair.last.weight)
    decoder = Decoder(
        num_blocks=3, token_width=8, num_classes=2, width=8, depth=1, heads=2, mlp_ratio=2.0, dropout=0.0,
        normalize_tokens=True,
    )  # fmt: skip
    student = Student(decoder, *pairs, source=source)
    found = student.pair_logits(tokens, attention, second)
    for logit, pair, weight in zip(found, pairs, (attention, inverse_attention(attention)), strict=True):
        channels = [pair_channels(weight, tokens, source=source)]
        channels.append(pair_channels(weight, second, source="attention+features")[:, 4:])
        torch.testing.assert_close(logit, pair(torch.cat(channels, 1)))
    with torch.no_grad():
        for logit, expected in zip(student.pair_logits(tokens, attention, second), found, strict=True):
            torch.testing.assert_close(logit, expected.detach(), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="channels"):
        student.pair_logits(tokens, attention, second[:, :1])


def test_a_run_compares_its_tokens_for_seeds_and_leaves_it_alone_for_masks():
    config = load("demo", ["decoder.width=32", "decoder.depth=1", f"affinity.encoder={NAME}"])
    config.affinity.encoder_checkpoint, config.affinity.encoder_blocks = "random", 2
    built, plain = build.segmenter(config, CPU), build.segmenter(load("demo", ["decoder.width=32"]), CPU)
    assert built.student.low.num_channels == plain.student.low.num_channels + 2
    image, labels = picture(2, 40, 56), torch.eye(10, dtype=torch.bool)[:2]
    features = built.encode(image)
    assert features.second_BMNE is not None and features.second_BMNE.shape == (2, 2, 35, 192)
    assert torch.equal(features.tokens_BLND, plain.encode(image).tokens_BLND)
    with torch.no_grad():
        together = [each.low_BNN for each in built._each_affinities(features)]
        low, high = built.student.pair_logits(features.tokens_BLND, features.attention_BLNN, features.second_BMNE)
    torch.testing.assert_close(torch.cat(together), built.affinities(low, high).low_BNN)
    assert built.encode(image, with_attention=False).second_BMNE is None
    assert built.pixel_seeds(image, labels, scales=[1.0], flip=True).score_BMHW.isfinite().all()
    # Nobody needs its weights for masks alone.
    assert build.model_description(config)["affinity"]["encoder"] == NAME
    only = assemble(config, plain.clip, torch.zeros(0, plain.clip.embed_dim), num_classes=10)
    only.student.load_state_dict(built.student.state_dict())
    only.student.eval(), built.student.eval()
    torch.testing.assert_close(
        only.logits(image, scales=[1.0], flip=False), built.logits(image, scales=[1.0], flip=False)
    )
