"""Frozen CLIP: patch tokens and attention of each block, and the similarity between patches and texts.

METHOD 1.1 (frozen encoder), 1.2 (attention without the class token) and the paragraph on the patch-text similarity. The
vision tower is walked block by block here, because one pass must give tokens, attention and a second residual path. No
gradient ever flows: `FrozenClip` is a plain object, so that assigning it inside an nn.Module registers no parameter.
"""

import json
import logging
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import open_clip
import safetensors.torch
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

Similarity = Literal["raw", "value", "surgery"]
CLIP_MEAN, CLIP_STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TEXT_CHUNK = 256  # texts encoded at once: bounds memory for a thousand classes with many templates
_CACHED_GRIDS = 32  # positional embeddings kept: images of many sizes must not fill the memory
_OPENAI_NOTES = ("input_resolution", "context_length", "vocab_size")  # not weights, but in OpenAI state dicts
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """What one frozen pass gives. Shapes in the legend of `dfa.core`; the class token is removed everywhere.

    tokens_BLND: residual stream after each chosen block, in the encoder's precision.
    attention_BLNN: softmax attention of each chosen block, fp32; L counts blocks, or blocks x heads (block-major) where
        the heads were kept. L is 0 where none was asked for.
    similarity_BNK, class_similarity_BK: cosine of patches, and of the class embedding, with the text bank, fp32; K is
        0 without a bank.
    grid: (h, w) in patches, N = h * w, row-major.
    """

    tokens_BLND: Tensor
    attention_BLNN: Tensor
    similarity_BNK: Tensor
    class_similarity_BK: Tensor
    grid: tuple[int, int]


class WordTokenizer:
    """Word-level tokenizer of a small CLIP: text -> token ids.

    Ids: 0 padding, 1 unknown word, 2.. the vocabulary in order, then start and end. The end has the largest id, because
    open_clip reads the text embedding at the position of the largest id.
    """

    def __init__(self, vocabulary: Sequence[str], context_length: int) -> None:
        self.id_of = {word: index for index, word in enumerate(vocabulary, start=2)}
        bad = sorted({word for word in vocabulary if re.fullmatch(r"[a-z]+", word) is None})
        if bad or len(self.id_of) != len(vocabulary):
            raise ValueError(f"vocabulary needs distinct words of the letters a-z; given {bad or 'duplicate words'}")
        self.context_length = context_length
        self.vocab_size = len(vocabulary) + 4
        self.start, self.end = self.vocab_size - 2, self.vocab_size - 1

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Token ids (number of texts, context length) int64; a text that is too long is cut and keeps its end token."""
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        ids = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            words = [self.id_of.get(word, 1) for word in re.findall(r"[a-z]+", text.lower())][: length - 2]
            row[: len(words) + 2] = torch.tensor([self.start, *words, self.end])
        return ids


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


def load_clip(
    model: str,
    checkpoint: str | Path,
    *,
    device: str | torch.device,
    precision: str,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    seed: int = 0,
) -> "FrozenClip":
    """The frozen CLIP of a model and its weights.

    model: an open_clip name with a ViT tower (`ViT-B-16-quickgelu`), or the path of an open_clip model JSON, which may
        hold a "vocabulary" for `WordTokenizer`.
    checkpoint: a .safetensors or .pt file; an open_clip tag (`openai`), fetched by open_clip; or "random" for weights
        drawn from `seed`, which must be asked for by that name.
    precision: fp32 | bf16 | fp16 of the vision tower, whatever the file's. The text tower stays fp32: it runs once.

    Raises ValueError for an unknown model, tag, precision or kind of file, and for weights that do not fit the model.
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
            clip: nn.Module = kind(**config)
        if is_file:
            _fit_weights(clip, _read_weights(Path(checkpoint)), model=model, path=checkpoint)
        else:
            _log.warning("CLIP %s has random weights (seed %d): its scores mean nothing", model, seed)
    else:
        clip = _fetch_pretrained(model, str(checkpoint))
    clip.to(device)
    return FrozenClip(
        clip, tokenizer or _byte_pair_tokenizer(model, config), dtype=PRECISIONS[precision], mean=mean, std=std
    )


def value_embedding(visual: VisionTransformer, residual_BTD: Tensor) -> Tensor:
    """Patch embeddings of the last block's value path: B x T x D entering the last block -> B x T x E, differentiable.

    MaskCLIP (Zhou et al. 2022): attention replaced by the identity, out_proj(v(ln_1(x))). Our reading: neither the
    residual nor the MLP of the last block (both blur what a patch says of itself); then ln_post and proj.
    """
    block = visual.transformer.resblocks[-1]
    _, _, value_BATd = _query_key_value(block, residual_BTD)
    return visual.ln_post(_project(block, value_BATd)) @ visual.proj


class FrozenClip:
    """An open_clip model with a ViT tower, in eval mode and without gradients."""

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable[..., Tensor],
        *,
        dtype: torch.dtype,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.clip: Any = clip.eval().requires_grad_(False)
        self.visual: Any = self.clip.visual
        _require_plain_vit(self.visual)
        self.visual.to(dtype)
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.device: torch.device = self.visual.proj.device
        self.patch_size: tuple[int, int] = tuple(self.visual.patch_size)
        self.num_blocks = len(self.visual.transformer.resblocks)
        self.num_heads: int = self.visual.transformer.resblocks[0].attn.num_heads
        self.width, self.embed_dim = (int(size) for size in self.visual.proj.shape)
        self.logit_scale = float(self.clip.logit_scale.exp())
        self._mean_3 = torch.tensor(mean, device=self.device).view(3, 1, 1)
        self._std_3 = torch.tensor(std, device=self.device).view(3, 1, 1)
        self._positions: dict[tuple[int, int], Tensor] = {}
        self._banks: dict[tuple, Tensor] = {}

    @torch.no_grad()
    def text_bank(self, prompts: Sequence[Sequence[str]], templates: Sequence[str]) -> Tensor:
        """Text embeddings, one row a column of prompts: K x E, fp32, L2-normalised, computed once for equal content.

        A row is the normalised mean over its prompts x templates of normalised embeddings: their order is irrelevant.
        Raises ValueError for a column without prompts and for a template without exactly one {}.
        """
        key = (tuple(map(tuple, prompts)), tuple(templates))
        if key not in self._banks:
            self._banks[key] = self._embed_columns(*key)
        return self._banks[key]

    def _embed_columns(self, prompts: tuple[tuple[str, ...], ...], templates: tuple[str, ...]) -> Tensor:
        bad = [template for template in templates if template.count("{}") != 1]
        if bad or not templates:
            raise ValueError(f"templates need exactly one {{}} each, given {bad or 'no template'}")
        empty = [column for column, texts in enumerate(prompts) if not texts]
        if empty:
            raise ValueError(f"text columns {empty} have no prompt")
        texts = [template.replace("{}", text) for column in prompts for text in column for template in templates]
        columns = [index for index, column in enumerate(prompts) for _ in range(len(column) * len(templates))]
        sum_KE = torch.zeros(len(prompts), self.embed_dim, device=self.device)
        for first in range(0, len(texts), _TEXT_CHUNK):
            ids = self.tokenizer(texts[first : first + _TEXT_CHUNK]).to(self.device)
            index = torch.tensor(columns[first : first + _TEXT_CHUNK], device=self.device)
            sum_KE.index_add_(0, index, F.normalize(self.clip.encode_text(ids).float(), dim=-1))
        return F.normalize(sum_KE, dim=-1)

    @torch.no_grad()
    def encode(
        self,
        image_B3HW: Tensor,
        text_bank_KE: Tensor | None,
        *,
        token_blocks: int | Sequence[int],
        attention_blocks: int | Sequence[int],
        similarity: Similarity,
        surgery_blocks: int,
        keep_heads: bool = False,
        renormalize_rows: bool = False,
    ) -> Features:
        """One frozen pass over images of one size, any multiple of the patch size.

        image_B3HW: RGB, uint8, or float in 0..1; normalised here.
        token_blocks, attention_blocks: 0-based block indices, ascending, or the number of last blocks (0 for none).
            They differ because the decoder reads every block, the affinity the last ones (METHOD 1.20, 1.2).
        similarity: the patch embedding compared with the texts. raw: the final tokens. value: `value_embedding`.
            surgery: a second residual path leaves the first where the last `surgery_blocks` blocks begin; each of them
            adds `_self_attend` of the original path's q, k, v (class token among the keys), projected, and no MLP
            (CLIP Surgery, Li et al. 2023, with the three self-attentions of METHOD). Patches are read from the second
            path, the class embedding always from the original one.
        renormalize_rows: attention rows sum to 1 again after the class token's column has gone.

        Raises ValueError for a size that is not a multiple of the patch and for blocks that do not exist.
        """
        grid = self._grid(image_B3HW)
        token_at = self._block_slots(token_blocks, "token_blocks")
        attention_at = self._block_slots(attention_blocks, "attention_blocks")
        if similarity not in ("raw", "value", "surgery"):
            raise ValueError(f"similarity {similarity!r} is not one of raw, value, surgery")
        if similarity == "surgery" and not 1 <= surgery_blocks <= self.num_blocks:
            raise ValueError(f"surgery_blocks {surgery_blocks} must lie in 1..{self.num_blocks}, the encoder's blocks")
        with torch.autocast(self.device.type, enabled=False):
            return self._walk(
                self._embed(image_B3HW, grid),
                grid,
                text_bank_KE,
                token_at=token_at,
                attention_at=attention_at,
                similarity=similarity,
                first_second=self.num_blocks - surgery_blocks if similarity == "surgery" else self.num_blocks,
                heads=self.num_heads if keep_heads else 1,
                renormalize_rows=renormalize_rows,
            )

    def _walk(
        self,
        x_BTD: Tensor,
        grid: tuple[int, int],
        bank_KE: Tensor | None,
        *,
        token_at: dict[int, int],
        attention_at: dict[int, int],
        similarity: Similarity,
        first_second: int,
        heads: int,
        renormalize_rows: bool,
    ) -> Features:
        """The residual stream through every block; `first_second` is the block where the second path begins."""
        batch, num_patches, last = len(x_BTD), grid[0] * grid[1], self.num_blocks - 1
        tokens_BLND = torch.empty(batch, len(token_at), num_patches, self.width, dtype=self.dtype, device=self.device)
        attention_BLNN = torch.empty(batch, len(attention_at) * heads, num_patches, num_patches, device=self.device)
        # In the last block only the class token is carried on where nobody reads the patches.
        reads_last = last in token_at or (similarity == "raw" and bank_KE is not None)
        entering_BTD = second_BTD = x_BTD
        for index, block in enumerate(self.visual.transformer.resblocks):
            entering_BTD = x_BTD
            query, key, value = _query_key_value(block, x_BTD)
            if index >= first_second and bank_KE is not None:
                start_BTD = x_BTD if index == first_second else second_BTD
                second_BTD = start_BTD + _project(block, _self_attend(query, key, value))
            if index in attention_at:
                slot = attention_at[index] * heads
                kept_BXNN = attention_BLNN[:, slot : slot + heads]
                mixed_BATd = _attend_and_keep(query, key, value, kept_BXNN, renormalize_rows)
            else:
                mixed_BATd = F.scaled_dot_product_attention(query, key, value)
            if index == last and not reads_last:
                x_BTD, mixed_BATd = x_BTD[:, :1], mixed_BATd[:, :, :1]
            x_BTD = x_BTD + _project(block, mixed_BATd)
            x_BTD = x_BTD + block.ls_2(block.mlp(block.ln_2(x_BTD)))
            if index in token_at:
                tokens_BLND[:, token_at[index]] = x_BTD[:, 1:]
        if bank_KE is None:
            empty = attention_BLNN.new_empty
            return Features(tokens_BLND, attention_BLNN, empty(batch, num_patches, 0), empty(batch, 0), grid)
        source_BTD = {"raw": x_BTD, "value": entering_BTD, "surgery": second_BTD}[similarity]
        cosines = self._cosines(source_BTD[:, 1:], x_BTD[:, 0], bank_KE, similarity)
        return Features(tokens_BLND, attention_BLNN, *cosines, grid)

    def _cosines(
        self, source_BND: Tensor, class_BD: Tensor, bank_KE: Tensor, similarity: Similarity
    ) -> tuple[Tensor, Tensor]:
        """Patch cosines B x N x K and class cosines B x K, fp32."""
        if bank_KE.ndim != 2 or bank_KE.shape[1] != self.embed_dim:
            raise ValueError(f"text bank of shape {tuple(bank_KE.shape)}, expected (columns, {self.embed_dim})")
        if similarity == "value":
            patch_BNE = value_embedding(self.visual, source_BND)
        else:
            patch_BNE = self.visual.ln_post(source_BND) @ self.visual.proj
        class_BE = self.visual.ln_post(class_BD) @ self.visual.proj
        bank_EK = F.normalize(bank_KE.to(self.device, torch.float32), dim=-1).T
        return F.normalize(patch_BNE.float(), dim=-1) @ bank_EK, F.normalize(class_BE.float(), dim=-1) @ bank_EK

    def _grid(self, image_B3HW: Tensor) -> tuple[int, int]:
        if image_B3HW.ndim != 4 or image_B3HW.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(image_B3HW.shape)}, expected (batch, 3, height, width)")
        (height, width), (patch_height, patch_width) = image_B3HW.shape[2:], self.patch_size
        if not height or not width or height % patch_height or width % patch_width:
            raise ValueError(
                f"image of {height} x {width} pixels is not a multiple of the patch, {patch_height} x {patch_width}"
            )
        return height // patch_height, width // patch_width

    def _block_slots(self, blocks: int | Sequence[int], name: str) -> dict[int, int]:
        """Block index -> place in the output."""
        chosen = list(range(self.num_blocks - blocks, self.num_blocks)) if isinstance(blocks, int) else list(blocks)
        if chosen != sorted(set(chosen)) or any(not 0 <= index < self.num_blocks for index in chosen):
            raise ValueError(f"{name} {blocks}: this encoder has {self.num_blocks} blocks, and indices must ascend")
        return {index: slot for slot, index in enumerate(chosen)}

    def _embed(self, image_B3HW: Tensor, grid: tuple[int, int]) -> Tensor:
        image = image_B3HW.to(self.device, non_blocking=True)
        scale = self._std_3 * (1.0 if image.is_floating_point() else 255.0)
        normalized = (image.float() / scale - self._mean_3 / self._std_3).to(self.dtype)
        patch_BND = self.visual.conv1(normalized).flatten(2).transpose(1, 2)
        class_B1D = self.visual.class_embedding.expand(len(image), 1, -1)
        return self.visual.ln_pre(torch.cat([class_B1D, patch_BND], dim=1) + self._position(grid))

    def _position(self, grid: tuple[int, int]) -> Tensor:
        """Positional embedding (1 + h*w) x D of a grid: bicubic, corners not aligned; untouched at the native grid."""
        native: Tensor = self.visual.positional_embedding
        if grid == tuple(self.visual.grid_size):
            return native
        if grid not in self._positions:
            if len(self._positions) >= _CACHED_GRIDS:
                self._positions.pop(next(iter(self._positions)))
            map_1Dhw = native[1:].float().T.reshape(1, self.width, *self.visual.grid_size)
            resized = F.interpolate(map_1Dhw, size=grid, mode="bicubic", align_corners=False)
            self._positions[grid] = torch.cat([native[:1], resized[0].flatten(1).T.to(native.dtype)])
        return self._positions[grid]


def _query_key_value(block: Any, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each B x A x T x d, of a block's normalised input."""
    batch, num_tokens, width = x_BTD.shape
    attention: nn.MultiheadAttention = block.attn
    packed = F.linear(block.ln_1(x_BTD), attention.in_proj_weight, attention.in_proj_bias)
    split = packed.view(batch, num_tokens, 3, attention.num_heads, width // attention.num_heads).permute(2, 0, 3, 1, 4)
    return split[0], split[1], split[2]


def _project(block: Any, mixed_BATd: Tensor) -> Tensor:
    """Heads joined, through the attention's output projection (and layer scale): B x T x D."""
    return block.ls_1(block.attn.out_proj(mixed_BATd.transpose(1, 2).flatten(2)))


def _attend_and_keep(query: Tensor, key: Tensor, value: Tensor, kept_BXNN: Tensor, renormalize_rows: bool) -> Tensor:
    """Plain attention; its map without the class token goes to `kept_BXNN` (X = 1: head mean, else every head).

    On a processor image after image: the maps of many together leave its cache, at 32 images of 441 patches for twice the time.
    """
    if query.device.type == "cpu" and len(query) > 1:
        parts = zip(query.split(1), key.split(1), value.split(1), kept_BXNN.split(1), strict=True)
        return torch.cat([_attend_and_keep(*part, renormalize_rows) for part in parts])
    weight_BATT = torch.softmax((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2), dim=-1)
    patches_BANN = weight_BATT[:, :, 1:, 1:]
    if kept_BXNN.shape[1] == 1:
        torch.mean(patches_BANN, 1, keepdim=True, dtype=torch.float32, out=kept_BXNN)
    else:
        kept_BXNN.copy_(patches_BANN)
    if renormalize_rows:
        kept_BXNN.div_(kept_BXNN.sum(-1, keepdim=True))
    return weight_BATT @ value


def _self_attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """mean(softmax(qq'/s), softmax(kk'/s), softmax(vv'/s)) v with s = sqrt d; no T x T map is held on fused kernels."""
    mixed = F.scaled_dot_product_attention(query, query, value)
    mixed = mixed + F.scaled_dot_product_attention(key, key, value)
    return (mixed + F.scaled_dot_product_attention(value, value, value)) / 3


def _require_plain_vit(visual: Any) -> None:
    """ValueError for vision towers whose blocks are not read here."""
    if not isinstance(visual, VisionTransformer):
        raise ValueError(
            f"vision tower {type(visual).__name__} is not supported: open_clip's own ViT is needed (no timm, no ResNet)"
        )
    if visual.attn_pool is not None or visual.pool_type != "tok":
        raise ValueError("vision towers that pool by attention or average are not supported: a class token is needed")
    kinds = {type(block.attn).__name__ for block in visual.transformer.resblocks}
    if kinds != {"MultiheadAttention"}:
        raise ValueError(f"attention {sorted(kinds)} is not supported: plain multi-head attention is needed")


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
    return config, tokenizer


def _byte_pair_tokenizer(model: str, config: dict[str, Any]) -> Callable[..., Tensor]:
    if model.endswith(".json"):
        return open_clip.SimpleTokenizer(context_length=config["text_cfg"].get("context_length", 77))
    return open_clip.get_tokenizer(model)


def _fetch_pretrained(model: str, tag: str) -> nn.Module:
    tags = open_clip.list_pretrained_tags_by_model(model)
    if model.endswith(".json") or tag not in tags:
        raise ValueError(f"checkpoint {tag!r} of {model!r} is no file; pretrained tags of this model: {tags or 'none'}")
    try:
        return open_clip.create_model(model, pretrained=tag, precision="fp32", device="cpu")
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the weights {tag!r} of {model!r} could not be fetched (no network?); download them elsewhere and "
            "give the .safetensors or .pt file as checkpoint"
        ) from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a file, never executing anything that it holds."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise ValueError(f"checkpoint {path} has suffix {path.suffix!r}, expected .safetensors, .pt, .pth or .bin")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("constants.pkl") for name in archive.namelist()):
                raise ValueError(
                    f"checkpoint {path} is a TorchScript archive: save its state dict as .safetensors first"
                )
    content = torch.load(path, map_location="cpu", weights_only=True)
    weights = content.get("state_dict", content)
    return {name.removeprefix("module."): value for name, value in weights.items() if name not in _OPENAI_NOTES}


def _fit_weights(clip: nn.Module, weights: dict[str, Tensor], *, model: str, path: str | Path) -> None:
    """Load `weights`, upcast to the model's fp32; ValueError naming keys that are missing, unexpected or misshapen."""
    own = clip.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in sorted(own.keys() & weights.keys())
        if weights[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        parts = {"missing keys": missing, "unexpected keys": unexpected, "other shapes": shapes}
        told = "; ".join(
            f"{len(keys)} {name} ({', '.join(keys[:4])}{', ...' if keys[4:] else ''})"
            for name, keys in parts.items()
            if keys
        )
        raise ValueError(f"checkpoint {path} does not fit the model {model}: {told}")
    clip.load_state_dict(weights)
