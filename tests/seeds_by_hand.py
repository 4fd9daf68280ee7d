"""Transport seeds of one image in float64, by NumPy and POT, from what the frozen CLIP gives: its tokens, attention and cosines.

For an untrained student (its logits of pairs are their prior), `cam.form=propagate` and `cam.columns=constant`.
"""

import numpy as np
import ot
import torch
from torch.nn import functional

from dfa.config import Config


def _norm(weight_NN: np.ndarray, rounds: int) -> np.ndarray:
    """Columns, then rows divided by their sums, again and again; then made symmetric."""
    for _ in range(rounds):
        weight_NN = weight_NN / weight_NN.sum(0, keepdims=True)
        weight_NN = weight_NN / weight_NN.sum(1, keepdims=True)
    return (weight_NN + weight_NN.T) / 2


def affinities(attention_LNN: np.ndarray, tokens_LND: np.ndarray, *, clip: float, rounds: int) -> list[np.ndarray]:
    """A_la and A_ha: of the mean attention and of its inverse, each with the mean cosine of the tokens."""
    num_patches = attention_LNN.shape[-1]
    centred_LND = tokens_LND - tokens_LND.mean(1, keepdims=True)
    unit_LND = centred_LND / np.linalg.norm(centred_LND, axis=-1, keepdims=True)
    cosine_NN = np.mean([unit_ND @ unit_ND.T for unit_ND in unit_LND], axis=0)
    found = []
    for high in (False, True):
        mean_NN = attention_LNN.mean(0)
        mean_NN = np.eye(num_patches) - mean_NN if high else mean_NN
        mean_NN = num_patches * (mean_NN + mean_NN.T) / 2
        prior_NN = (mean_NN if high else np.log(np.maximum(mean_NN, 1e-38))).clip(-clip, clip)
        found.append(_norm(np.exp((prior_NN + cosine_NN).clip(-clip, clip)), rounds))
    return found


def _stretched(map_NK: np.ndarray) -> np.ndarray:
    low_K, high_K = map_NK.min(0), map_NK.max(0)
    return (map_NK - low_K) / (high_K - low_K)


def transport_cam(
    cosine_NK: np.ndarray, low_NN: np.ndarray, high_NN: np.ndarray, num_foreground: int, cam
) -> np.ndarray:
    """CAM of the foreground columns (the first ones of the cosines), N x M."""
    logit_NK = cam.scale * cosine_NK
    share_NK = np.exp(logit_NK - logit_NK.max(1, keepdims=True))
    share_NK /= share_NK.sum(1, keepdims=True)
    score_NM = (share_NK / share_NK.max(0))[:, :num_foreground]
    for _ in range(cam.propagation - 1):
        score_NM = low_NN @ score_NM
    value_NM = cam.lambda_low * _stretched(low_NN @ score_NM) + cam.lambda_high * _stretched(high_NN @ score_NM)
    score_NK, value_NK = (np.pad(each, ((0, 0), (0, 1)), constant_values=cam.constant) for each in (score_NM, value_NM))
    weight_K = np.exp(score_NK.mean(0) / cam.marginal_temperature)
    rows_N = np.full(len(value_NK), 1 / len(value_NK))
    plan_NK = ot.sinkhorn(rows_N, weight_K / weight_K.sum(), -value_NK, cam.epsilon, stopThr=1e-12, numItermax=100_000)
    return (plan_NK / plan_NK.max(0))[:, :num_foreground]


def seeds(config: Config, segmenter, image_3HW: torch.Tensor, labels: tuple[int, ...]) -> np.ndarray:
    """Scores of the image's classes at its own size, (classes, H, W): the mean over scales and mirrored copies."""
    height, width = image_3HW.shape[1:]
    num_classes = segmenter.student.decoder.classify.out_features - 1
    columns = [*(label - 1 for label in labels), *range(num_classes, len(segmenter.bank_KE))]
    total = np.zeros((len(labels), height, width))
    views = [(scale, mirrored) for scale in config.evaluate.cam_scales for mirrored in (False, True)]
    for scale, mirrored in views if config.evaluate.flip else views[::2]:
        patch = segmenter.patch_size
        size = [max(1, round(side * scale / patch)) * patch for side in (height, width)]
        view = functional.interpolate(image_3HW[None].float() / 255, size, mode="bilinear", antialias=True)
        features = segmenter.encode(view.flip(3) if mirrored else view)
        attention, tokens, cosine = (
            each[0].double().numpy()
            for each in (features.attention_BLNN, features.tokens_BLND, features.similarity_BNK)
        )
        pair = affinities(attention, tokens, clip=config.affinity.clip, rounds=config.affinity.sinkhorn_rounds)
        cam_NM = transport_cam(cosine[:, columns], *pair, len(labels), config.cam)
        grid = torch.from_numpy(cam_NM.T.reshape(len(labels), *features.grid))[None]
        grid = grid.flip(3) if mirrored else grid
        total += functional.interpolate(grid, (height, width), mode="bilinear")[0].numpy()
    return total / (len(views) if config.evaluate.flip else len(views) // 2)
