"""Transport seeds of one image in float64, by NumPy and POT, from what the frozen CLIP gives: its tokens, attention and cosines.

For an untrained student (its logits of pairs are their prior) and the default stage: `affinity.source=attention`, `cam.form=propagate`,
`cam.columns=strongest`, `cam.marginal=area` and `cam.normalization=row`.
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


def affinities(attention_LNN: np.ndarray, *, clip: float, rounds: int) -> list[np.ndarray]:
    """A_s and A_inv, of the mean attention and of its inverse."""
    num_patches, found = attention_LNN.shape[-1], []
    for high in (False, True):
        mean_NN = attention_LNN.mean(0)
        mean_NN = np.eye(num_patches) - mean_NN if high else mean_NN
        mean_NN = num_patches * (mean_NN + mean_NN.T) / 2
        prior_NN = mean_NN if high else np.log(np.maximum(mean_NN, 1e-38))
        found.append(_norm(np.exp(prior_NN.clip(-clip, clip)), rounds))
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
    best_N, rest_N = logit_NK[:, :num_foreground].max(1), logit_NK[:, num_foreground:].max(1)
    background_N1 = 1 / (1 + np.exp(best_N - rest_N))[:, None]
    score_NK = np.concatenate([share_NK[:, :num_foreground], background_N1], axis=1)
    score_NK = score_NK / score_NK.max(0)
    for _ in range(cam.propagation - 1):
        score_NK = low_NN @ score_NK
    smooth_NK = _stretched(low_NN @ score_NK)
    weight_NK = np.exp(smooth_NK / cam.marginal_temperature)
    marginal_K = (weight_NK / weight_NK.sum(1, keepdims=True)).mean(0)
    value_NK = cam.lambda_low * smooth_NK + cam.lambda_high * _stretched(high_NN @ score_NK)
    rows_N = np.full(len(value_NK), 1 / len(value_NK))
    plan_NK = ot.sinkhorn(rows_N, marginal_K, -value_NK, cam.epsilon, stopThr=1e-12, numItermax=100_000)
    return (plan_NK / plan_NK.sum(1, keepdims=True))[:, :num_foreground]


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
        attention, cosine = (each[0].double().numpy() for each in (features.attention_BLNN, features.similarity_BNK))
        pair = affinities(attention, clip=config.affinity.clip, rounds=config.affinity.sinkhorn_rounds)
        cam_NM = transport_cam(cosine[:, columns], *pair, len(labels), config.cam)
        grid = torch.from_numpy(cam_NM.T.reshape(len(labels), *features.grid))[None]
        grid = grid.flip(3) if mirrored else grid
        total += functional.interpolate(grid, (height, width), mode="bilinear")[0].numpy()
    return total / (len(views) if config.evaluate.flip else len(views) // 2)
