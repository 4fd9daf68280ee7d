"""What a CLIP knows of the world: classification and localisation on scenes that it never saw."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dfa.clip import FrozenClip, Similarity
from dfa.core.cam import class_scores
from dfa.core.metrics import best_threshold, threshold_confusion
from dfa.label.seed import column_mask
from dfa.world.scenes import BACKGROUNDS, CLASSES, Scene, draw

_BATCH = 25


def mean_average_precision(score_BC: Tensor, labels_BC: Tensor) -> float:
    """Mean over classes of the area under the precision-recall curve (the mean of the precisions at each positive)."""
    order = score_BC.argsort(dim=0, descending=True)
    hits = labels_BC.gather(0, order).double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, dtype=torch.float64)[:, None]
    return float(((precision * hits).sum(0) / hits.sum(0).clamp_min(1)).mean())


def measure_clip(
    clip: FrozenClip, template: str, *, seed: int, num_scenes: int, thresholds: Sequence[float]
) -> dict[str, float]:
    """Scores on scenes 0..num_scenes-1 of the world `seed`.

    Returns:
        `mean_average_precision` of the class embedding against the class names (0..1), and for each similarity
        `seed_miou_raw`, `seed_miou_value` and `seed_miou_surgery`: patch-text seeds with the image-level labels known,
        no affinity, best background threshold, mIoU in percent, background included.
    """
    scenes = [draw(seed, index) for index in range(num_scenes)]
    bank_KE = clip.text_bank([(name,) for name in (*CLASSES, *BACKGROUNDS)], [template])
    labels_BC = torch.tensor([[label in scene.labels for label in range(1, len(CLASSES) + 1)] for scene in scenes])
    result = {"mean_average_precision": 0.0}
    kinds: tuple[Similarity, ...] = ("raw", "value", "surgery")
    for kind in kinds:
        confusion_TCC: Tensor | int = 0
        classes = []
        for first in range(0, num_scenes, _BATCH):
            part, chosen = scenes[first : first + _BATCH], labels_BC[first : first + _BATCH]
            map_BCHW, class_BK = _seed_maps(clip, part, chosen, bank_KE, kind)
            target_BHW = torch.from_numpy(np.stack([scene.mask_HW for scene in part]))
            confusion_TCC = confusion_TCC + threshold_confusion(map_BCHW, target_BHW, thresholds=thresholds)
            classes.append(class_BK)
        assert isinstance(confusion_TCC, Tensor)
        result[f"seed_miou_{kind}"] = 100 * best_threshold(confusion_TCC, thresholds=thresholds)[1]
        result["mean_average_precision"] = mean_average_precision(torch.cat(classes)[:, : len(CLASSES)], labels_BC)
    return result


def _seed_maps(
    clip: FrozenClip, scenes: Sequence[Scene], labels_BC: Tensor, bank_KE: Tensor, kind: Similarity
) -> tuple[Tensor, Tensor]:
    """Pixel maps B x C x H x W (0 for absent classes) and class-embedding similarities B x K."""
    image_B3HW = torch.from_numpy(np.stack([scene.image_HW3 for scene in scenes])).permute(0, 3, 1, 2)
    features = clip.encode(
        image_B3HW,
        bank_KE,
        token_blocks=(),
        attention_blocks=(),
        similarity=kind,
        surgery_blocks=max(1, clip.num_blocks // 2),
    )
    mask_BK = column_mask(labels_BC, len(bank_KE))
    score_BNK = class_scores(features.similarity_BNK, mask_BK, scale=clip.logit_scale)[:, :, : labels_BC.shape[1]]
    map_BChw = score_BNK.mT.unflatten(2, features.grid)
    size = (image_B3HW.shape[2], image_B3HW.shape[3])
    return functional.interpolate(map_BChw, size=size, mode="bilinear"), features.class_similarity_BK
