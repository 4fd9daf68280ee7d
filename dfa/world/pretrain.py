"""Train the tiny CLIP on captioned scenes of our world, so that the whole system runs without a download.

Only captions supervise: a sentence that names the objects and the background of a scene. Three terms:

- *class token*: a sigmoid contrastive loss between image embeddings and texts (Zhai et al., "Sigmoid Loss for Language
  Image Pre-Training", ICCV 2023). A text is positive for **every** scene of which it is true, so the false negatives
  of a batch of few classes do not exist.
- *patch presence*: a name in the caption must be found by the k best patches, an absent name by none (multiple-instance
  learning on patch-text similarity; the class token alone learns to classify and localises backwards, METHOD 1b).
- *patch exclusivity*: every patch must be explained by some name of the caption. Half of the pictures are mixed: a
  rectangle of one is pasted into another, and each patch answers to the caption of the picture that it came from.
  Without it the class is written onto any patch that attention reaches, mostly beside the object.

Both patch terms act on the last block's value path and on the plain output tokens, so that `similarity: value` and
`raw` both localise. Random erasing hides parts now and then, which makes the body of an object evidence for its class.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from dfa.clip import WordTokenizer, build_clip, read_model_json
from dfa.world.scenes import BACKGROUNDS, CLASSES, caption, draw, draw_close_up

log = logging.getLogger(__name__)

NAMES: tuple[str, ...] = (*CLASSES, *BACKGROUNDS)
TEMPLATES: tuple[str, ...] = ("a photo of a {}", "a {}", "{}", "a picture of the {}")
_PATCH = 8
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""OpenAI CLIP's own normalisation, which the tiny model shares so that one code path serves both."""


def vocabulary() -> list[str]:
    """All words that the captions and templates use, ascending: what the model JSON lists."""
    texts = [template.format(name) for template in TEMPLATES for name in NAMES]
    texts += [caption((1, 2), background) for background in BACKGROUNDS]
    return sorted({word for text in texts for word in text.split()})


@dataclass(frozen=True)
class PretrainSettings:
    """How the tiny CLIP is trained; the values that made the shipped checkpoint are the defaults."""

    seed: int = 0
    close_up_steps: int = 1500
    close_up_batch_size: int = 32
    scene_steps: int = 3500
    scene_batch_size: int = 32
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup_steps: int = 150
    class_token_weight: float = 2.0
    patch_weight: float = 1.0
    exclusive_weight: float = 1.0
    mixed_share: float = 0.5
    patch_scale: float = 20.0
    presence_patches: tuple[int, ...] = (3, 10)
    erase_probability: float = 0.5
    average_decay: float = 0.995
    checkpoint_every: int = 150

    @property
    def num_steps(self) -> int:
        """Close-ups first, scenes after them."""
        return self.close_up_steps + self.scene_steps


# -- captioned scenes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionedBatch:
    """Images with what their captions name; the last `num_mixed` are mixed from two.

    image_B3HW: uint8. present_BK: bool, K = 16 names (classes, then backgrounds), of the picture or of both.
    allowed_BNK: bool, the names of the picture that each patch came from.
    """

    image_B3HW: Tensor
    present_BK: Tensor
    allowed_BNK: Tensor
    num_mixed: int


def _augmented(image: np.ndarray, rng: np.random.Generator, erase_probability: float) -> np.ndarray:
    """Flips, brightness, and erased squares filled with noise around a random colour."""
    if rng.random() < 0.5:
        image = image[:, ::-1]
    if rng.random() < 0.5:
        image = np.clip(image * rng.uniform(0.8, 1.2) + rng.uniform(-15, 15, 3), 0, 255).astype(np.uint8)
    image = image.copy()
    if rng.random() < erase_probability:
        for _ in range(rng.integers(1, 4)):
            side = rng.integers(10, 30)
            top, left = rng.integers(0, len(image) - side, 2)
            fill = rng.uniform(0, 255, 3) + rng.standard_normal((side, side, 3)) * 10
            image[top : top + side, left : left + side] = np.clip(fill, 0, 255)
    return image


class _Captioned(IterableDataset):
    """One batch a step, a pure function of (settings, step): close-ups first, then scenes."""

    def __init__(self, settings: PretrainSettings, first_step: int) -> None:
        self.settings, self.first_step = settings, first_step

    def __iter__(self) -> Iterator[CaptionedBatch]:
        for step in range(self.first_step, self.settings.num_steps):
            yield self.batch(step)

    def batch(self, step: int) -> CaptionedBatch:
        settings = self.settings
        near = step < settings.close_up_steps
        size = settings.close_up_batch_size if near else settings.scene_batch_size
        pictures = [self._picture(step * size + row, near=near) for row in range(size)]
        images, present = (np.stack(values) for values in zip(*pictures, strict=True))
        side = images.shape[1] // _PATCH
        allowed = np.broadcast_to(present[:, None, None], (size, side, side, len(NAMES))).copy()
        num_mixed = int(settings.mixed_share * size)
        mixed, rng = images.copy(), np.random.default_rng([settings.seed, step, 3])
        for row in range(size - num_mixed, size):
            (top, left), (height, width) = rng.integers(0, side - 2, 2), rng.integers(3, side - 2, 2)
            patches = np.s_[top : top + height, left : left + width]
            pixels = tuple(slice(_PATCH * each.start, _PATCH * each.stop) for each in patches)
            other = row - (size - num_mixed)
            mixed[row][pixels] = images[other][pixels]
            allowed[row][patches] = present[other]
            present[row] |= present[other]
        image_B3HW = torch.from_numpy(mixed).permute(0, 3, 1, 2)
        allowed_BNK = torch.from_numpy(allowed.reshape(size, -1, len(NAMES)))
        return CaptionedBatch(image_B3HW, torch.from_numpy(present), allowed_BNK, num_mixed)

    def _picture(self, index: int, *, near: bool) -> tuple[np.ndarray, np.ndarray]:
        """An augmented image and which of NAMES its caption holds."""
        settings = self.settings
        scene = draw_close_up(settings.seed, index) if near else draw(settings.seed, index)
        rng = np.random.default_rng([settings.seed, index, 1, int(near)])
        present = np.zeros(len(NAMES), bool)
        present[[label - 1 for label in scene.labels]] = True
        present[len(CLASSES) + BACKGROUNDS.index(scene.background)] = True
        return _augmented(scene.image_HW3, rng, settings.erase_probability), present


def _texts(present_BK: np.ndarray, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """The texts of one step, and for each which names it claims (T, K): every name once, and a caption per scene that
    names some of its classes and its background."""
    texts = [TEMPLATES[rng.integers(len(TEMPLATES))].format(name) for name in NAMES]
    claims = list(np.eye(len(NAMES), dtype=bool))
    for row in present_BK:
        labels = np.flatnonzero(row[: len(CLASSES)])
        kept = rng.permutation(labels)[: rng.integers(1, len(labels) + 1)] if len(labels) else labels
        background = int(np.flatnonzero(row[len(CLASSES) :])[0])
        texts.append(caption(tuple(int(label) + 1 for label in kept), BACKGROUNDS[background]))
        claim = np.zeros(len(NAMES), bool)
        claim[kept] = claim[len(CLASSES) + background] = True
        claims.append(claim)
    return texts, np.stack(claims)


# -- model outputs and losses ----------------------------------------------------------------------------------------


def image_embeddings(model: nn.Module, image_B3HW: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Class-token embedding (B, E) and patch embeddings [value path, output tokens] (B, N, E), all L2-normalised."""
    visual: Any = model.visual
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    x = visual.conv1((image_B3HW.float() / 255 - mean) / std).flatten(2).transpose(1, 2)
    position = _positions(visual.positional_embedding, math.isqrt(x.shape[1]))
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + position
    x = visual.ln_pre(x)
    value = x
    for number, block in enumerate(visual.transformer.resblocks):
        if number == len(visual.transformer.resblocks) - 1:
            attention = block.attn
            width = x.shape[-1]
            value = F.linear(block.ln_1(x), attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :])
            value = attention.out_proj(value)
        x = block(x)
    x, value = visual.ln_post(x) @ visual.proj, visual.ln_post(value) @ visual.proj
    return F.normalize(x[:, 0], dim=-1), [F.normalize(value[:, 1:], dim=-1), F.normalize(x[:, 1:], dim=-1)]


def _positions(embedding: Tensor, side: int) -> Tensor:
    """Positional embedding (1 + N, D) of a square grid of another size, bicubic as in `dfa.clip`."""
    trained = math.isqrt(len(embedding) - 1)
    if side == trained:
        return embedding
    grid = embedding[1:].T.unflatten(1, (trained, trained))[None]
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([embedding[:1], grid[0].flatten(1).T])


def class_token_loss(similarity_BT: Tensor, true_BT: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Sigmoid contrastive loss, positives and negatives weighing the same (a name is absent far more often)."""
    logit = similarity_BT * scale.exp() + bias
    loss = F.binary_cross_entropy_with_logits(logit, true_BT.float(), reduction="none")
    return 0.5 * (loss[true_BT].mean() + loss[~true_BT].mean())


def presence_loss(similarity_BNK: Tensor, present_BK: Tensor, counts: tuple[int, ...]) -> Tensor:
    """The best patches of a present name must have it, those of an absent name must not.

    Args:
        similarity_BNK: scaled patch-text similarity over all names.
        present_BK: which names the caption holds.
        counts: numbers of best patches whose mean probability must be high for a present name.
    """
    best = similarity_BNK.softmax(-1).topk(max(counts), dim=1).values
    presence = torch.stack([-best[:, :count].mean(1)[present_BK].clamp_min(1e-6).log().mean() for count in counts])
    absent = -torch.log1p(-best[:, : min(counts)].mean(1)[~present_BK].clamp_max(1 - 1e-4)).mean()
    return presence.mean() + absent


def exclusive_loss(similarity_BNK: Tensor, allowed_BNK: Tensor) -> Tensor:
    """Each patch's probability must lie on the names that its own picture's caption holds."""
    log_probability = similarity_BNK.log_softmax(-1)
    return -torch.logsumexp(log_probability.masked_fill(~allowed_BNK, -1e4), -1).mean()


# -- training --------------------------------------------------------------------------------------------------------


class _Trainable(nn.Module):
    """The CLIP and the two numbers of the sigmoid loss, which are not part of the shipped model."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-3.0))


def _loss(
    model: _Trainable,
    batch: CaptionedBatch,
    tokenizer: WordTokenizer,
    settings: PretrainSettings,
    step: int,
    embed: Callable[..., Any],
) -> tuple[Tensor, dict[str, float]]:
    rng = np.random.default_rng([settings.seed, step, 2])
    pure_BK = batch.present_BK[: len(batch.present_BK) - batch.num_mixed]
    texts, claims = _texts(pure_BK.numpy(), rng)
    clip: Any = model.clip
    text_TE = F.normalize(clip.encode_text(tokenizer(texts)), dim=-1)
    image_BE, patches = embed(model.clip, batch.image_B3HW)
    claims_TK = torch.from_numpy(claims)
    true_BT = ~(claims_TK[None] & ~batch.present_BK[:, None]).any(-1)
    pure = slice(0, len(image_BE) - batch.num_mixed)
    similarity_BT = image_BE[pure] @ text_TE.T
    parts = {"class_token": class_token_loss(similarity_BT, true_BT[pure], model.scale, model.bias)}
    for path, patch_BNE in zip(("value", "raw"), patches, strict=True):
        similarity_BNK = settings.patch_scale * patch_BNE @ text_TE[: len(NAMES)].T
        parts[f"presence_{path}"] = presence_loss(
            similarity_BNK[pure], batch.present_BK[pure], settings.presence_patches
        )
        parts[f"exclusive_{path}"] = exclusive_loss(similarity_BNK, batch.allowed_BNK)
    total = settings.class_token_weight * parts["class_token"]
    for path in ("value", "raw"):
        term = parts[f"presence_{path}"] + settings.exclusive_weight * parts[f"exclusive_{path}"]
        total = total + 0.5 * settings.patch_weight * term
    return total, {name: part.item() for name, part in parts.items()}


def _optimizer(model: nn.Module, settings: PretrainSettings) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


def _learning_rate(settings: PretrainSettings, step: int) -> float:
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.num_steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _build(model_json: Path, settings: PretrainSettings) -> nn.Module:
    torch.manual_seed(settings.seed)
    clip = build_clip(model_json)
    # The scale with which the patch terms were trained is the scale with which similarities are read later.
    clip.logit_scale.data.fill_(math.log(settings.patch_scale))
    clip.logit_scale.requires_grad_(False)
    return clip


def pretrain(
    model_json: Path, settings: PretrainSettings, work: Path, *, compile_model: bool = True
) -> dict[str, Tensor]:
    """Train and return the averaged weights (fp16). Killed and started again, it goes on from `work`.

    Args:
        model_json: open_clip model description with our `vocabulary` key.
        settings: see `PretrainSettings`.
        work: folder of the resumable state (safetensors and JSON) and `log.jsonl`.
        compile_model: use torch.compile for the image tower (about 1.3 x on CPU).
    """
    work.mkdir(parents=True, exist_ok=True)
    model = _Trainable(_build(model_json, settings))
    _, tokenizer = read_model_json(model_json)
    if tokenizer is None:
        raise ValueError(f"{model_json}: the tiny CLIP needs a word list under the key vocabulary")
    optimizer = _optimizer(model, settings)
    average = {name: value.detach().clone() for name, value in model.clip.state_dict().items()}
    first_step, spent_s = _restore(work, settings, model, optimizer, average)
    embed = torch.compile(image_embeddings) if compile_model else image_embeddings
    loader = DataLoader(_Captioned(settings, first_step), batch_size=None, num_workers=1, prefetch_factor=4)
    started = time.monotonic()
    for step, batch in enumerate(loader, start=first_step):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(settings, step)
        loss, parts = _loss(model, batch, tokenizer, settings, step, embed)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        decay = min(settings.average_decay, (1 + step) / (10 + step))
        for name, value in model.clip.state_dict().items():
            average[name].lerp_(value, 1 - decay)
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.num_steps:
            seconds = spent_s + time.monotonic() - started
            _save(work, settings, model, optimizer, average, step + 1, seconds)
            record = {"step": step + 1, "seconds": round(seconds, 1), **{k: round(v, 4) for k, v in parts.items()}}
            with (work / "log.jsonl").open("a") as stream:
                stream.write(json.dumps(record) + "\n")
            log.info("%s", record)
    return {name: value.half() for name, value in average.items()}


def _save(
    work: Path,
    settings: PretrainSettings,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    step: int,
    seconds: float,
) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    progress = {"step": str(step), "seconds": str(seconds), "settings": json.dumps(asdict(settings))}
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, work / "state.tmp", progress)
    (work / "state.tmp").replace(work / "state.safetensors")


def _restore(
    work: Path,
    settings: PretrainSettings,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
) -> tuple[int, float]:
    path = work / "state.safetensors"
    if not path.exists():
        return 0, 0.0
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        progress = file.metadata()
    if json.loads(progress["settings"]) != json.loads(json.dumps(asdict(settings))):
        raise ValueError(f"{path} was made with other settings: {progress['settings']}; given {asdict(settings)}")
    tensors = load_file(path)
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    for name in average:
        average[name].copy_(tensors[f"average.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, field = name.split(".")
            state.setdefault(int(number), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(progress["step"]), float(progress["seconds"])
