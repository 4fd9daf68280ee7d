"""Tiny CLIPs, pictures and a second library's tower for the tests of this folder."""

import json

import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from dfa.clip import CLIP_MEAN, CLIP_STD, load_clip

WORDS = ["a", "photo", "of", "red", "dog", "cat", "tree"]


def write_model(folder, top=None, vision=None, vocabulary=True):
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16} | (vision or {}),
        "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
    } | (top or {})
    if vocabulary:
        config["vocabulary"] = WORDS
    path = folder / "model.json"
    path.write_text(json.dumps(config))
    return str(path)


def load(path, checkpoint="random", precision="fp32", seed=3):
    return load_clip(path, checkpoint, device="cpu", precision=precision, seed=seed)


def picture(batch=2, height=32, width=32):
    return torch.randint(
        0, 256, (batch, 3, height, width), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )


def bank(clip, columns=5):
    return F.normalize(torch.randn(columns, clip.embed_dim, generator=torch.Generator().manual_seed(2)), dim=-1)


def normalized(image):
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    return (image.double() / 255 - mean) / std


def assert_relative(got, expected, tolerance=1e-5):
    """The issue's bound: error relative to the largest entry, fp32 against another summation order."""
    assert got.shape == expected.shape
    assert (got.double() - expected.double()).abs().max() <= tolerance * expected.abs().max()


def transformers_copy(clip, activation):
    """transformers' vision tower holding the same weights."""
    config = CLIPVisionConfig(
        hidden_size=clip.width, intermediate_size=4 * clip.width, projection_dim=clip.embed_dim,
        num_hidden_layers=clip.num_blocks, num_attention_heads=clip.num_heads, image_size=clip.visual.image_size[0],
        patch_size=clip.patch_size[0], hidden_act=activation, attn_implementation="eager",
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config).eval()
    own = clip.visual.state_dict()
    state = {
        "vision_model.embeddings.class_embedding": own["class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": own["conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": own["positional_embedding"],
        "visual_projection.weight": own["proj"].T,
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for kind in ("weight", "bias"):
        state[f"vision_model.pre_layrnorm.{kind}"] = own[f"ln_pre.{kind}"]
        state[f"vision_model.post_layernorm.{kind}"] = own[f"ln_post.{kind}"]
        for block in range(clip.num_blocks):
            ours, theirs = f"transformer.resblocks.{block}", f"vision_model.encoder.layers.{block}"
            state |= {f"{theirs}.{new}.{kind}": own[f"{ours}.{old}.{kind}"] for old, new in names.items()}
            packed = own[f"{ours}.attn.in_proj_{kind}"].chunk(3)
            state |= {f"{theirs}.self_attn.{n}_proj.{kind}": part for n, part in zip("qkv", packed, strict=True)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    return model
