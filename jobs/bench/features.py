"""The frozen pass against open_clip's bare forward, with transformers' output_attentions beside it."""

import statistics
import time
from typing import Any

import torch

from jobs.bench.measure import Result, interleave, versions

DEFAULT_REPEATS = 5
_MODEL, _BATCH = "ViT-B-16-quickgelu", 2
_SIZES = (320, 224)  # METHOD's crop, and the size at which the tower is native
_COLUMNS = 45  # VOC: 20 classes and 25 background prompts


def features(repeats: int) -> Result:
    """Tokens of all blocks but the last, attention of the last 8 without the class token, similarity by surgery of the last 5."""
    torch.set_num_threads(1)
    times = {size: _measure(size, repeats if size == _SIZES[0] else max(2, repeats - 2)) for size in _SIZES}
    ours_ms, peer_ms, attentions_ms = times[_SIZES[0]]
    ratio = {size: statistics.median(peer) / statistics.median(ours) for size, (ours, peer, _) in times.items()}
    against = {size: statistics.median(theirs) / statistics.median(ours) for size, (ours, _, theirs) in times.items()}
    return Result(
        title="Frozen pass",
        unit="ms an image",
        ours=statistics.median(ours_ms),
        peer=statistics.median(peer_ms),
        ours_range=(min(ours_ms), max(ours_ms)),
        peer_range=(min(peer_ms), max(peer_ms)),
        peer_name="open_clip's bare forward",
        versions=versions("open_clip_torch", "torch", "transformers"),
        lines=(
            f"{_MODEL}, random weights, fp32, one thread, batches of {_BATCH} at {_SIZES[0]} x {_SIZES[0]}, {repeats} interleaved"
            " repeats, processor time. Ours also gives the tokens of all blocks but the last, the head mean of the last 8 attentions"
            f" and the cosines of surgery (last 5 blocks) with {_COLUMNS} texts; the peer gives one embedding.",
            "",
            f"At {_SIZES[1]} x {_SIZES[1]}: ratio **{ratio[_SIZES[1]]:.2f}**. Against transformers with output_attentions (eager; all"
            f" blocks and heads, no similarity, {statistics.median(attentions_ms):.0f} ms): **{against[_SIZES[0]]:.2f}**, and"
            f" {against[_SIZES[1]]:.2f} at {_SIZES[1]}.",
        ),
        extra={"ratio_224": ratio[224], "transformers": against[_SIZES[0]], "batch": _BATCH, "repeats": repeats},
    )


def _measure(size: int, repeats: int) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds an image: ours, open_clip, transformers."""
    import open_clip
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from dfa.clip import load_clip

    clip = load_clip(_MODEL, "random", device="cpu", precision="fp32")
    bare: Any = open_clip.create_model(_MODEL, pretrained=None, force_image_size=size).eval()
    theirs = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=768, intermediate_size=3072, projection_dim=512, num_hidden_layers=12, num_attention_heads=12,
            image_size=size, patch_size=16, hidden_act="quick_gelu", attn_implementation="eager",  # type: ignore
        )
    ).eval()  # fmt: skip
    bank_KE = torch.nn.functional.normalize(torch.randn(_COLUMNS, clip.embed_dim), dim=-1)
    image_B3HW = torch.randint(0, 256, (_BATCH, 3, size, size), dtype=torch.uint8)
    ready_B3HW = image_B3HW.float() / 255  # the peers are given what they take

    def ours() -> object:
        return clip.encode(
            image_B3HW,
            bank_KE,
            token_blocks=tuple(range(clip.num_blocks - 1)),
            attention_blocks=8,
            similarity="surgery",
            surgery_blocks=5,
            renormalize_rows=True,
        )

    @torch.no_grad()
    def peer() -> object:
        return bare.visual(ready_B3HW)

    @torch.no_grad()
    def attentions() -> object:
        return theirs(ready_B3HW, output_attentions=True)

    clock = time.process_time
    ours_ms, peer_ms = interleave(ours, peer, repeats=repeats, per=_BATCH, clock=clock)
    _, attentions_ms = interleave(ours, attentions, repeats=max(1, repeats // 2), per=_BATCH, clock=clock)
    return ours_ms, peer_ms, attentions_ms
