"""The frozen encoder, and the segmenter around it."""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dfa import config as configuration
from dfa.build.data import class_set
from dfa.clip import ClipEnsemble, FrozenClip, load_clip, patch_size_of, vision_size_of
from dfa.clip.encoder import SecondEncoder
from dfa.config import ClipConfig, Config
from dfa.core.affinity import PairLogit
from dfa.label.seed import SeedSettings
from dfa.model.decoder import Decoder
from dfa.model.segmenter import EncoderSettings, Segmenter
from dfa.model.student import Student
from dfa.train.checkpoint import WeightKind, find_checkpoint, load_weights, read_info

_log = logging.getLogger(__name__)

_HIGH_PRIORS = {"inverse": "high", "attention": "high_as_low"}  # of affinity.high_prior


def device(config: Config) -> torch.device:
    """Where a job without workers of its own computes."""
    if config.train.use_gpu and not torch.cuda.is_available():
        raise ValueError("train.use_gpu is true and torch sees no GPU; set train.use_gpu=false")
    return torch.device("cuda" if config.train.use_gpu else "cpu")


def encoder(config: Config, device: torch.device) -> FrozenClip | ClipEnsemble:
    """The frozen CLIP, or several of them."""
    clip = config.clip
    common: dict[str, Any] = {"device": device, "precision": clip.precision, "mean": clip.mean, "std": clip.std}
    common["compiled"] = config.train.compile
    pairs = [(clip.model, clip.checkpoint), *other_clips(clip)]
    members = [load_clip(beside_conf(model), beside_conf(checkpoint), **common) for model, checkpoint in pairs]
    return members[0] if len(members) == 1 else ClipEnsemble(members)


def check_clip(config: Config) -> None:
    """Load the weights of CLIP and of a second encoder once, where their errors are told at once and in one line; workers would tell
    them one by one. Weights that are fetched are then on this machine.

    Raises:
        ValueError: weights that are absent, damaged or of another architecture.
    """
    second_encoder(config, torch.device("cpu"))
    if any(checkpoint != "random" for _, checkpoint in [("", config.clip.checkpoint), *other_clips(config.clip)]):
        encoder(config, torch.device("cpu"))


def other_clips(clip: ClipConfig) -> list[tuple[str, str]]:
    """(model, checkpoint) of each entry of clip.others.

    Raises:
        ValueError: an entry without both.
    """
    pairs = [entry.rpartition("@") for entry in clip.others]
    bad = [
        entry for entry, (model, _, checkpoint) in zip(clip.others, pairs, strict=True) if not (model and checkpoint)
    ]
    if bad:
        raise ValueError(f"clip.others has {bad[0]!r}, allowed is MODEL@CHECKPOINT, such as ViT-L-14-quickgelu@openai")
    return [(model, checkpoint) for model, _, checkpoint in pairs]


def beside_conf(name: str) -> str:
    """A file named relative to the project's folder is found from any working directory."""
    return configuration.project_file(name)


def patch_size(model: str) -> int:
    """Pixels along a patch of the encoder that clip.model names, without its weights."""
    return patch_size_of(beside_conf(model))


def num_token_blocks(config: Config) -> int:
    """How many blocks' tokens the decoder reads, known without building the encoder."""
    return config.clip.token_blocks or max(1, vision_size_of(beside_conf(config.clip.model)).layers - 1)


def segmenter(config: Config, device: torch.device) -> Segmenter:
    """Frozen CLIP, text bank and a student with fresh weights (drawn from train.seed)."""
    clip, classes = encoder(config, device), class_set(config)
    bank_KE = clip.text_bank([*classes.prompts, *((text,) for text in classes.background)], classes.templates)
    second = second_encoder(config, device)
    return assemble(config, clip, bank_KE, num_classes=len(classes.names), second=second)


def second_encoder(config: Config, device: torch.device) -> SecondEncoder | None:
    """The encoder that affinity.encoder names, None where it names none.

    Raises:
        ValueError: timm is not installed, no such ViT, weights that are not there or do not fit.
    """
    affinity = config.affinity
    if not affinity.encoder:
        return None
    if importlib.util.find_spec("timm") is None:
        raise ValueError(f"affinity.encoder={affinity.encoder} needs timm (pip install timm)")
    from dfa.clip.second import load_vit

    return load_vit(
        affinity.encoder,
        beside_conf(affinity.encoder_checkpoint),
        num_blocks=affinity.encoder_blocks,
        device=device,
        precision=config.clip.precision,
    )


def assemble(
    config: Config,
    clip: FrozenClip | ClipEnsemble,
    bank_KE: torch.Tensor,
    *,
    num_classes: int,
    second: SecondEncoder | None = None,
) -> Segmenter:
    """A CLIP, a text bank (of no column where no CAM is wanted), a student with fresh weights, and the second encoder (None where no
    affinity is wanted)."""
    blocks, settings = clip.num_blocks, config.clip
    token_blocks = tuple(range(num_token_blocks(config)))
    attention_blocks = tuple(range(max(0, blocks - settings.attention_blocks), blocks))
    if token_blocks[-1] >= blocks:
        raise ValueError(f"clip.token_blocks is {settings.token_blocks}, {settings.model} has {blocks} blocks")
    keep_heads = config.affinity.heads == "all"
    if keep_heads and settings.others:
        raise ValueError("affinity.heads=all needs one CLIP: the attention of several (clip.others) is averaged")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        num_maps = len(attention_blocks) * (clip.num_heads if keep_heads else 1)
        student = _student(config, clip.width, len(token_blocks), num_maps, num_classes)
    return Segmenter(
        clip,
        bank_KE,
        student.to(clip.device),
        encoder=EncoderSettings(
            token_blocks,
            attention_blocks,
            settings.similarity,  # type: ignore[arg-type]
            settings.surgery_blocks,
            keep_heads,
        ),
        seed=_seed_settings(config, clip),
        sinkhorn_rounds=config.affinity.sinkhorn_rounds,
        second=second,
    )


def trained_segmenter(config: Config, device: torch.device, which: str = "best") -> Segmenter:
    """The run's segmenter with the student of a checkpoint: `best`, `latest` or a step number; label.weights says which of its
    weights. Settings of the decoder and of the affinity that were others in training are told."""
    folder, weights = find_checkpoint(config.run, which), config.label.weights
    info = read_info(folder)
    if other := _other_settings(config, info.model):
        _log.warning("%s was trained with other settings: %s", folder, "; ".join(other))
    built = segmenter(config, device)
    load_student(built, folder, class_names=class_set(config).names, kind=weights)  # type: ignore[arg-type]
    built.use_learned = uses_learned(config, info.step)
    return built


def uses_learned(config: Config, step: int) -> bool:
    """Whether the affinities of a checkpoint of this step make labels, or the un-learned ones (affinity.use_from_step)."""
    return step >= config.affinity.use_from_step


def load_student(built: Segmenter, folder: str, *, class_names: Sequence[str], kind: WeightKind = "auto") -> None:
    """Give the segmenter the student of a checkpoint folder, for inference.

    Raises:
        CorruptCheckpointError: unreadable or changed files.
        ValueError: other classes than `class_names`, weights of another decoder or affinity, or no average where
            `kind` asks for it.
    """
    weights, _ = load_weights(folder, class_names=class_names, kind=kind)
    # What else an objective trains, such as FFR's second head, serves training alone.
    own = {name.removeprefix("student."): value for name, value in weights.items() if name.startswith("student.")}
    _check_fit(own, built.student.state_dict(), folder)
    built.student.load_state_dict(own)
    built.student.eval()


def _other_settings(config: Config, trained: Mapping[str, Any]) -> list[str]:
    """What a checkpoint's decoder and affinity were trained with and this configuration has not; some of it has no weights."""
    found, now = list[str](), model_description(config)
    for section in ("decoder", "affinity"):
        for key, value in trained.get(section, {}).items():
            if key in now[section] and value != now[section][key]:
                found.append(f"{section}.{key}={value!r}, now {now[section][key]!r}")
    return found


def _check_fit(saved: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], folder: str) -> None:
    bad = sorted(saved.keys() ^ wanted.keys())
    bad += [name for name in saved.keys() & wanted.keys() if saved[name].shape != wanted[name].shape]
    if bad:
        raise ValueError(
            f"checkpoint {folder} does not fit this configuration's decoder and affinity: {bad[:4]}; give the settings that it was"
            " trained with (run.json of its run has them)"
        )


def decoder_of(config: Config, width: int, num_tokens: int, num_classes: int, *, grid_share: float) -> Decoder:
    """A decoder with fresh weights on `num_tokens` token blocks of `width`; grid_share instead of decoder.grid."""
    decoder = config.decoder
    return Decoder(
        num_blocks=num_tokens,
        token_width=width,
        num_classes=num_classes,
        width=decoder.width,
        depth=decoder.depth,
        heads=decoder.heads,
        mlp_ratio=decoder.mlp_ratio,
        dropout=decoder.dropout,
        normalize_tokens=decoder.normalize_tokens,
        mixer=decoder.mixer,  # type: ignore[arg-type]
        radius=decoder.radius,
        drop=decoder.drop,
        grid_share=grid_share,
    )


def _student(config: Config, width: int, num_tokens: int, num_attention: int, num_classes: int) -> Student:
    affinity = config.affinity
    num_features = num_tokens if affinity.source == "attention+features" else 0
    num_features += affinity.encoder_blocks if affinity.encoder else 0

    def pair_logit(prior: Any) -> PairLogit:
        return PairLogit(
            num_attention + num_features,
            hidden=affinity.hidden,
            clip=affinity.clip,
            prior=prior,
            num_feature_channels=num_features,
        )

    return Student(
        decoder_of(config, width, num_tokens, num_classes, grid_share=config.decoder.grid),
        pair_logit("low"),
        pair_logit(_HIGH_PRIORS[affinity.high_prior]),
        source=affinity.source,  # type: ignore[arg-type]
    )


def _seed_settings(config: Config, clip: FrozenClip | ClipEnsemble) -> SeedSettings:
    cam: Any = config.cam
    return SeedSettings(
        generator=cam.generator,
        scale=cam.scale or clip.logit_scale,
        propagation=cam.propagation,
        lambda_low=cam.lambda_low,
        lambda_high=cam.lambda_high,
        form=cam.form,
        columns=cam.columns,
        constant=cam.constant,
        marginal=cam.marginal,
        marginal_temperature=cam.marginal_temperature,
        epsilon=cam.epsilon,
        max_iterations=cam.iterations,
        tolerance=cam.tolerance,
        normalization=cam.normalization,
    )


def model_description(config: Config) -> dict[str, Any]:
    """What a checkpoint's weights fit: kept in checkpoints, and compared when one is loaded for training."""
    described = configuration.to_dict(config)
    del described["affinity"]["use_from_step"]  # when maps make labels, whatever their weights
    return {name: described[name] for name in ("method", "clip", "decoder", "affinity")}
