"""From an open_clip model's name, or its JSON, and a checkpoint to the frozen CLIP."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from dfa.clip.encoder import FrozenClip
from dfa.clip.hub import only_what_is_cached_without_a_network
from dfa.clip.tokenizer import WordTokenizer
from dfa.clip.weights import activation_mismatch, fit_weights, read_weights

CLIP_MEAN, CLIP_STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_log = logging.getLogger(__name__)


def read_model_json(path: str | Path) -> tuple[dict[str, Any], WordTokenizer | None]:
    """An open_clip model description and its word tokenizer (None when the file has no "vocabulary")."""
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - config.keys()
    if missing:
        raise ValueError(f"{path}: not an open_clip model description, it lacks {sorted(missing)}")
    vocabulary = config.pop("vocabulary", None)
    if vocabulary is None:
        return config, None
    tokenizer = WordTokenizer(vocabulary, config["text_cfg"]["context_length"])
    config["text_cfg"]["vocab_size"] = tokenizer.vocab_size
    return config, tokenizer


def build_clip(model_json: str | Path) -> open_clip.CLIP:
    """A trainable CLIP with fresh weights (from torch's global generator) described by an open_clip model JSON."""
    config, _ = read_model_json(model_json)
    return open_clip.CLIP(**config)


def patch_size_of(model: str) -> int:
    """Pixels along a patch of an open_clip model, or of a model JSON, without building it."""
    config, _ = _model_config(model)
    return int(config["vision_cfg"]["patch_size"])


@dataclass(frozen=True)
class VisionSize:
    """Of a ViT tower."""

    patch_size: int
    width: int
    layers: int
    mlp_ratio: float


def vision_size_of(model: str) -> VisionSize:
    """The tower of an open_clip model, or of a model JSON, without building it."""
    config, _ = _model_config(model)
    vision = config["vision_cfg"]
    return VisionSize(
        int(vision["patch_size"]), int(vision["width"]), int(vision["layers"]), float(vision.get("mlp_ratio", 4.0))
    )


def load_clip(
    model: str,
    checkpoint: str | Path,
    *,
    device: str | torch.device,
    precision: str,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    seed: int = 0,
    compiled: bool = False,
) -> FrozenClip:
    """The frozen CLIP of a model and its weights.

    model: an open_clip name with a ViT tower (`ViT-B-16-quickgelu`), or the path of an open_clip model JSON, which may hold
        a "vocabulary" for `WordTokenizer`.
    checkpoint: a .safetensors or .pt file (a state dict, or OpenAI's TorchScript archive); an open_clip tag (`openai`),
        fetched by open_clip; or "random" for weights drawn from `seed`, which must be asked for by that name.
    precision: fp32 | bf16 | fp16 of the vision tower, whatever the file's. The text tower stays fp32: it runs once.
    compiled: see `FrozenClip`.

    Raises ValueError for an unknown model, tag, precision or kind of file, for weights that do not fit the model, and for those
    trained with another activation than the model's where the tag or the file tells it; a bare state dict does not.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {sorted(PRECISIONS)}")
    if not checkpoint:
        raise ValueError(
            f'no checkpoint given for {model!r}: name a file, an open_clip tag, or "random" for random weights'
        )
    config, tokenizer = _model_config(model)
    is_file = Path(checkpoint).is_file()
    if is_file or str(checkpoint) == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
            try:
                clip: nn.Module = kind(**config)
            except TypeError as error:  # a key that open_clip's classes do not know
                raise ValueError(f"model {model!r} does not describe a CLIP: {error}") from error
        if is_file:
            fit_weights(clip, read_weights(Path(checkpoint)), model=model, path=checkpoint)
        else:
            _log.warning("CLIP %s has random weights (seed %d): its scores mean nothing", model, seed)
    else:
        clip = _fetch_pretrained(model, str(checkpoint))
    clip.to(device)
    tokenizer = tokenizer or _byte_pair_tokenizer(model, config)
    return FrozenClip(clip, tokenizer, dtype=PRECISIONS[precision], mean=mean, std=std, compiled=compiled)


def _model_config(model: str) -> tuple[dict[str, Any], WordTokenizer | None]:
    if model.endswith(".json"):
        if not Path(model).is_file():
            raise ValueError(f"model description {model} does not exist")
        config, tokenizer = read_model_json(model)
    else:
        config, tokenizer = open_clip.get_model_config(model), None
        if config is None:
            raise ValueError(
                f"{model!r} is neither an open_clip model nor the path of a .json; see open_clip.list_models()"
            )
    if "timm_model_name" in config["vision_cfg"] or "hf_model_name" in config["text_cfg"]:
        raise ValueError(
            f"model {model!r} has a timm or Hugging Face tower: only open_clip's own ViT towers are supported"
        )
    missing = [
        name for name in ("patch_size", "width", "layers") if not isinstance(config["vision_cfg"].get(name), int)
    ]
    if missing:  # open_clip's ResNets have a list of layers, and no patches
        raise ValueError(f"model {model!r} is no ViT: its vision_cfg has no number for {', '.join(missing)}")
    return config, tokenizer


def _byte_pair_tokenizer(model: str, config: dict[str, Any]) -> Callable[..., Tensor]:
    if model.endswith(".json"):
        return open_clip.SimpleTokenizer(context_length=config["text_cfg"].get("context_length", 77))
    return open_clip.get_tokenizer(model)


def _fetch_pretrained(model: str, tag: str) -> nn.Module:
    tags = open_clip.list_pretrained_tags_by_model(model)
    if model.endswith(".json") or tag not in tags:
        raise ValueError(f"checkpoint {tag!r} of {model!r} is no file; pretrained tags of this model: {tags or 'none'}")
    described = open_clip.get_pretrained_cfg(model, tag)
    has_quick = bool((open_clip.get_model_config(model) or {}).get("quick_gelu", False))
    if bool(described.get("quick_gelu", False)) != has_quick:
        raise ValueError(f"checkpoint {tag!r}: {activation_mismatch(model, has_quick)}")
    try:
        with only_what_is_cached_without_a_network():
            return open_clip.create_model(model, pretrained=tag, precision="fp32", device="cpu")
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the weights {tag!r} of {model!r} could not be fetched ({type(error).__name__}; no network?). Where there is "
            f"internet, download {_sources(described)}; copy the file here, for instance to weights/, and name it: "
            "clip.checkpoint=weights/FILE"
        ) from error


def _sources(described: dict[str, Any]) -> str:
    """Where the weights of a tag are published, as open_clip's register has it."""
    found = [described["url"]] if described.get("url") else []
    if described.get("hf_hub"):
        repository, _, file = described["hf_hub"].rpartition("/")
        found.append(f"{file or 'open_clip_model.safetensors'} of https://huggingface.co/{repository}")
    return " or ".join(found)
