"""The decoder's mixers against attention: parameters, operations and time, at the sizes of ViT-B/16 and of the demo."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dfa.build.model import decoder_of
from dfa.config import load
from jobs.bench.measure import Result, take_turns, versions

DEFAULT_REPEATS = 5
_MIXERS = ("attention", "spam", "hybrid")
_BATCH = 4


@dataclass(frozen=True)
class _Size:
    """What the decoder gets. grids: height and width in patches."""

    name: str
    conf: str
    token_width: int
    num_tokens: int
    num_classes: int
    grids: tuple[tuple[int, int], ...]


_SIZES = (
    _Size("ViT-B/16", "voc_dfa", 768, 11, 20, ((20, 20), (40, 40))),
    _Size("the demo", "demo", 128, 5, 10, ((14, 14),)),
)


def mixer(repeats: int) -> Result:
    """The blocks of the decoder alone, forward and backward, on fused features."""
    torch.set_num_threads(1)
    rows: list[str] = [
        "| size, grid | mixer | parameters of the blocks | GFLOP an image | ms an image, training | masks alone |"
    ]
    rows.append("|" + "---|" * 6)
    timed: dict[tuple[Any, ...], list[float]] = {}
    extra: dict[str, Any] = {"repeats": repeats}
    for size in _SIZES:
        decoders = {kind: _decoder(size, kind) for kind in _MIXERS}
        for grid in size.grids:
            calls = {(kind, way): _call(decoders[kind], size, grid, way) for kind in _MIXERS for way in (True, False)}
            times_ms = take_turns(calls, repeats=repeats, per=_BATCH, clock=time.process_time, at_least_s=0.3)
            for kind, decoder in decoders.items():
                training, masks = (times_ms[kind, way] for way in (True, False))
                timed[size.name, grid, kind] = training
                parameters = sum(each.numel() for each in decoder.blocks.parameters())
                giga = sum(block.flops(grid) for block in decoder.blocks) / 1e9
                place = f"{size.name}, {grid[0]} x {grid[1]}"
                medians = [statistics.median(each) for each in (training, masks)]
                rows.append(f"| {place} | {kind} | {parameters} | {giga:.3g} | {medians[0]:.3g} | {medians[1]:.3g} |")
                extra[f"{place}, {kind}"] = {"parameters": parameters, "gflop": giga, "training_ms": medians[0]}
    ours, peer = (timed[_SIZES[0].name, _SIZES[0].grids[0], kind] for kind in ("spam", "attention"))
    return Result(
        title="Mixers of the decoder",
        unit="ms an image",
        ours=statistics.median(ours),
        peer=statistics.median(peer),
        ours_range=(min(ours), max(ours)),
        peer_range=(min(peer), max(peer)),
        peer_name="attention",
        versions=versions("torch"),
        lines=(
            f"The decoder's blocks on fused features (the MLPs before them are the same for all), fp32, one thread, batches of {_BATCH},"
            f" {repeats} interleaved repeats, processor time. Ours below: spam, ViT-B/16's size, {_SIZES[0].grids[0][0]} x"
            f" {_SIZES[0].grids[0][1]} patches, training.",
            "",
            *rows,
        ),
        extra=extra,
    )


def _decoder(size: _Size, kind: str) -> Any:
    config = load(size.conf, [f"decoder.mixer={kind}", "train.use_gpu=false"])
    torch.manual_seed(0)
    return decoder_of(config, size.token_width, size.num_tokens, size.num_classes, grid_share=0.0)


def _call(decoder: Any, size: _Size, grid: tuple[int, int], training: bool) -> Callable[[], None]:
    fused_BDhw = torch.randn(_BATCH, decoder.fuse.out_features, *grid, generator=torch.Generator().manual_seed(1))

    def train() -> None:
        decoder.train().decode(fused_BDhw.requires_grad_()).square().mean().backward()

    def infer() -> None:
        with torch.inference_mode():
            decoder.eval().decode(fused_BDhw.detach())

    return train if training else infer
