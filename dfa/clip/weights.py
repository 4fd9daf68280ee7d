"""Weight files of a CLIP: read without executing anything, compared with the model by name, and asked for their activation."""

import json
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from dfa.clip.archive import is_archive, read_archive

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_OPENAI_NOTES = (
    "input_resolution",
    "context_length",
    "vocab_size",
)  # not weights, but in OpenAI's files, and only there
_OPENAI_WORDS = 49408
_MASK = "attn_mask"  # a constant of the text tower, which an archive does not tell from a weight
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """tensors: by open_clip's names. quick_gelu: the activation that the file itself, or a description beside it, tells; None
    where nothing does, as of a bare state dict; evidence: what tells it."""

    tensors: dict[str, Tensor]
    quick_gelu: bool | None = None
    evidence: str = ""


def read_weights(path: Path) -> Weights:
    """The weights of a file: safetensors, a pickled state dict (plain or as `state_dict` of a training checkpoint), or a
    TorchScript archive such as OpenAI's.

    Raises ValueError for another suffix, a damaged file, and one that would have to execute something.
    """
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"checkpoint {path} has suffix {path.suffix!r}, expected one of {', '.join(_SUFFIXES)}")
    classes: set[str] = set()
    if path.suffix == ".safetensors":
        try:
            content: Any = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"checkpoint {path} is no whole safetensors file: {error}") from error
    elif is_archive(path):
        content, classes = read_archive(path)
    else:
        content = _load_pickled(path)
    notes = [name for name in _OPENAI_NOTES if name in content]
    tensors = {name.removeprefix("module."): value for name, value in content.items()}
    tensors = {name: value for name, value in tensors.items() if name not in (*_OPENAI_NOTES, _MASK)}
    if "QuickGELU" in classes:
        return Weights(tensors, True, "the modules of this TorchScript archive")
    if notes:
        return Weights(tensors, True, f"{notes[0]}, an entry of OpenAI's own files")
    if "GELU" in classes:
        return Weights(tensors, False, "the modules of this TorchScript archive")
    return Weights(tensors, *_told_beside(path))


def _told_beside(path: Path) -> tuple[bool | None, str]:
    """What open_clip's description says of the activation, which published folders of open_clip's weights hold."""
    beside = path.with_name("open_clip_config.json")
    if not path.name.startswith("open_clip") or not beside.is_file():
        return None, ""
    try:
        described = json.loads(beside.read_text(encoding="utf-8"))["model_cfg"]
        return bool(described.get("quick_gelu", False)), f"{beside.name} beside it"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{beside} is no description of open_clip's, a JSON with model_cfg: {error}") from error


def _load_pickled(path: Path) -> Mapping[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        # torch's own message proposes to execute the file.
        raise ValueError(
            f"checkpoint {path} is damaged, or holds more than tensors and is therefore not loaded; "
            "save its state dict as .safetensors"
        ) from error
    except OSError:
        raise
    except Exception as error:  # what is no pickle at all makes the reader stumble in any way
        raise ValueError(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from error
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"checkpoint {path} holds {type(weights).__name__}, expected a state dict")
    other = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(
            f"checkpoint {path}: {other[:4]} are no tensors; expected a state dict, or one as 'state_dict'"
        )
    return weights


def fit_weights(clip: nn.Module, weights: Weights, *, model: str, path: str | Path) -> None:
    """Load weights, upcast to the model's fp32.

    Raises ValueError naming both architectures where they differ, keys that are missing, unexpected or misshapen, numbers that are
    not finite, and an activation that is not the file's.
    """
    own, tensors = clip.state_dict(), weights.tensors
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{name}: {tuple(tensors[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in sorted(own.keys() & tensors.keys())
        if tensors[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        parts = {"missing keys": missing, "unexpected keys": unexpected, "other shapes": shapes}
        told = "; ".join(
            f"{len(keys)} {name} ({', '.join(keys[:4])}{', ...' if keys[4:] else ''})"
            for name, keys in parts.items()
            if keys
        )
        raise ValueError(f"checkpoint {path} does not fit the model {model}: {_difference(tensors, own)}{told}")
    if bad := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(f"checkpoint {path} holds numbers that are not finite, in {len(bad)} tensors ({bad[0]}, ...)")
    _check_activation(clip, weights, model=model, path=path)
    clip.load_state_dict(tensors)


def _difference(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What a person calls the two: patch, width, blocks and embedding of the vision towers, where they differ."""
    if "vision_model.embeddings.class_embedding" in tensors:
        return "these are transformers' names, open_clip's or OpenAI's are needed; "
    file, model = _architecture(tensors), _architecture(own)
    if file is None:
        return "the file has no vision transformer of open_clip's names; "
    return f"the file holds a {file}, the model is a {model}; " if file != model else ""


def _architecture(tensors: Mapping[str, Tensor]) -> str | None:
    stem, projection = tensors.get("visual.conv1.weight"), tensors.get("visual.proj")
    positions = tensors.get("visual.positional_embedding")
    if stem is None or projection is None or positions is None or stem.ndim != 4 or projection.ndim != 2:
        return None
    blocks = {name.split(".")[3] for name in tensors if name.startswith("visual.transformer.resblocks.")}
    return (
        f"ViT of patch {stem.shape[-1]}, width {stem.shape[0]}, {len(blocks)} blocks, {len(positions) - 1} patches "
        f"and embedding {projection.shape[-1]}"
    )


def _check_activation(clip: Any, weights: Weights, *, model: str, path: str | Path) -> None:
    has_quick = any(isinstance(module, QuickGELU) for module in clip.visual.modules())
    if weights.quick_gelu is not None and weights.quick_gelu != has_quick:
        raise ValueError(f"checkpoint {path}: {activation_mismatch(model, has_quick)} (told by {weights.evidence})")
    if weights.quick_gelu is None and (is_half := _may_be_openais(weights.tensors)) != has_quick:
        _log.warning(
            "checkpoint %s does not tell its activation. Its matrices are %s half precision, as OpenAI's are, which need QuickGELU,"
            " and %s has %s: if they are %s, %s",
            path,
            "exactly" if is_half else "not",
            model,
            "QuickGELU" if has_quick else "GELU",
            "OpenAI's" if is_half else "LAION's or DataComp's",
            _other_activation(model, has_quick),
        )


def activation_mismatch(model: str, has_quick: bool) -> str:
    """The sentence that says which of the two activations is wrong, and which model has the other."""
    needed, given = ("GELU", "QuickGELU") if has_quick else ("QuickGELU", "GELU")
    fix = _other_activation(model, has_quick)
    return f"these weights were trained with {needed}, the model {model} has {given}; {fix}"


def _other_activation(model: str, has_quick: bool) -> str:
    if model.endswith(".json"):
        return f'set "quick_gelu" to {"false" if has_quick else "true"} in it'
    return f"take {model.removesuffix('-quickgelu') if has_quick else model + '-quickgelu'}"


def _may_be_openais(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the text tower has OpenAI's vocabulary and the MLPs of the vision tower are half precision, however stored."""
    words = tensors.get("token_embedding.weight")
    names = [name for name in tensors if name.startswith("visual.") and ".mlp." in name]
    matrices = [tensors[name] for name in names if tensors[name].ndim == 2]
    is_half = bool(matrices) and all(torch.equal(each, each.half().to(each.dtype)) for each in matrices)
    return words is not None and len(words) == _OPENAI_WORDS and is_half
