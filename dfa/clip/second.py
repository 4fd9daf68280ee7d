"""A second frozen encoder beside CLIP, any timm ViT (DINO and its successors), whose tokens tell what belongs together."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfa.clip.hub import only_what_is_cached_without_a_network
from dfa.clip.models import PRECISIONS
from dfa.clip.weights import read_weights
from dfa.data.classes import nearest

_UNUSED = ("head.", "head_dist.", "fc_norm.", "mask_token")  # of classifiers, and of pre-training
_log = logging.getLogger(__name__)


class FrozenVit:
    """Patch tokens of a timm ViT on the patch grid of another encoder. A plain object, which registers no parameter."""

    def __init__(
        self, model: nn.Module, *, num_blocks: int, dtype: torch.dtype, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.model: Any = model.eval().requires_grad_(False).to(dtype)
        depth = len(self.model.blocks)
        if not 1 <= num_blocks <= depth:
            raise ValueError(f"the second encoder has {depth} blocks, the last {num_blocks} are asked for")
        self._indices, self.num_blocks, self.dtype = list(range(depth - num_blocks, depth)), num_blocks, dtype
        self.patch_size: tuple[int, int] = tuple(self.model.patch_embed.patch_size)
        self.device: torch.device = self.model.patch_embed.proj.weight.device
        self._mean_3, self._std_3 = (torch.tensor(each, device=self.device).view(3, 1, 1) for each in (mean, std))

    @torch.no_grad()
    def tokens(self, image_B3HW: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens of the last blocks, each behind the encoder's final norm: B x M x N x D with N = h * w of `grid`.

        image_B3HW: RGB, uint8, or float in 0..1. It is resized (bilinear, antialiased) so that this encoder's own patches make the
        same grid: nothing is interpolated between tokens.
        """
        size = (grid[0] * self.patch_size[0], grid[1] * self.patch_size[1])
        image = image_B3HW.to(self.device)
        image = image if image.is_floating_point() else image.float() / 255
        with torch.autocast(self.device.type, enabled=False):
            if tuple(image.shape[-2:]) != size:
                image = F.interpolate(image.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
            normalized = ((image - self._mean_3) / self._std_3).to(self.dtype)
            found = self.model.forward_intermediates(
                normalized, indices=self._indices, norm=True, output_fmt="NLC", intermediates_only=True
            )
            return torch.stack(found, dim=1)


def load_vit(
    name: str,
    checkpoint: str,
    *,
    num_blocks: int,
    device: str | torch.device,
    precision: str,
    seed: int = 0,
) -> FrozenVit:
    """The second encoder of a timm name and its weights.

    name: such as vit_base_patch16_224.dino or vit_base_patch14_dinov2.
    checkpoint: a weight file (.safetensors, or a state dict as .pth), "pretrained" for timm's own, fetched at first use, or "random"
        for weights drawn from `seed`.

    Raises ValueError for an unknown name, one that is no ViT, weights that are not there or do not fit.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {sorted(PRECISIONS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _create(name, fetched=checkpoint == "pretrained")
    if checkpoint == "random":
        _log.warning("second encoder %s has random weights (seed %d)", name, seed)
    elif checkpoint != "pretrained":
        if not Path(checkpoint).is_file():
            raise ValueError(
                f"affinity.encoder_checkpoint is {checkpoint!r}, allowed are pretrained, random and the path of a file"
            )
        _fit(model, Path(checkpoint), name)
    described: Any = model.pretrained_cfg
    return FrozenVit(
        model.to(device),
        num_blocks=num_blocks,
        dtype=PRECISIONS[precision],
        mean=described["mean"],
        std=described["std"],
    )


def _create(name: str, *, fetched: bool) -> Any:
    if not timm.is_model(name.partition(".")[0]):
        near = nearest(name, timm.list_models("*vit*"))
        raise ValueError(f"affinity.encoder {name!r} is no model of timm; the nearest ViT is {near!r}")
    published = timm.list_pretrained(f"{name.partition('.')[0]}.*") if "." in name else [name]
    if name not in published:
        raise ValueError(
            f"affinity.encoder {name!r}: timm has no such weights; the nearest is {nearest(name, published)!r}"
        )
    try:
        with only_what_is_cached_without_a_network():
            model: Any = timm.create_model(name, pretrained=fetched, num_classes=0, dynamic_img_size=True)
    except TypeError as error:  # it takes no dynamic_img_size
        raise ValueError(f"affinity.encoder {name!r} is no ViT for images of any size") from error
    except (OSError, RuntimeError) as error:
        described: Any = timm.get_pretrained_cfg(name)
        place = (described and (described.hf_hub_id or described.url)) or "no published place"
        raise ValueError(
            f"the weights of {name!r} could not be fetched ({type(error).__name__}; no network?). Where there is internet,"
            f" download model.safetensors of {place}; copy it here, for instance to weights/, and name it:"
            " affinity.encoder_checkpoint=weights/FILE"
        ) from error
    if not all(hasattr(model, part) for part in ("blocks", "patch_embed", "forward_intermediates")):
        raise ValueError(f"affinity.encoder {name!r} is no ViT: it has no blocks of patches")
    return model


def _fit(model: Any, path: Path, name: str) -> None:
    """Load a file that any of timm's own names, or those of the ViT's first publication, describe."""
    tensors = read_weights(path).tensors
    renamed = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if renamed is not None:
        try:
            tensors = renamed(tensors, model)
        except (KeyError, RuntimeError, AttributeError) as error:
            raise ValueError(f"checkpoint {path} does not fit affinity.encoder {name}: {error}") from error
    own = model.state_dict()
    tensors = {key: value for key, value in tensors.items() if key in own or not key.startswith(_UNUSED)}
    bad = sorted(own.keys() ^ tensors.keys())
    bad += [key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape]
    if bad:
        raise ValueError(
            f"checkpoint {path} does not fit affinity.encoder {name}: {len(bad)} weights differ, {bad[:4]}"
        )
    model.load_state_dict(tensors)
