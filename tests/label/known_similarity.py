"""The label stage on a similarity that is known: patch-text cosines and affinities made from real masks.

    DFA_SAMPLE_DATA=FOLDER python -m tests.label.known_similarity

prints what each setting makes of it, over contrasts and numbers of background prompts that are true of an image. It says what the
stage does to a given S and A, not what a CLIP gives. A present class is .03 above the noise everywhere and `contrast` more on its
own patches, blurred by `leak`; each true background prompt is .03 above the noise and .7 contrast more on its own region of the
background. The affinity is the overlap of two patches' classes, with noise, and falls with their distance.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dfa import config
from dfa.core.affinity import symmetric_affinity
from dfa.label.seed import Affinities, SeedSettings, make_seeds

GRID, NUM_CLASSES, NUM_PROMPTS, VOID = 20, 20, 25, 255
THRESHOLDS = (0.02, *(round(0.05 * step, 2) for step in range(1, 20)))


@dataclass(frozen=True)
class Pictures:
    """cover_BNC: share of each patch that each class covers, background first. label_BN: the class that covers most, void where
    more than half is. labels_BC: image-level labels of classes 1 to 20."""

    cover_BNC: Tensor
    label_BN: Tensor
    labels_BC: Tensor

    def __getitem__(self, chosen: Tensor | slice) -> "Pictures":
        return Pictures(self.cover_BNC[chosen], self.label_BN[chosen], self.labels_BC[chosen])


def read_pictures(sample_data: Path, *, every: int = 1) -> Pictures:
    """One of `every` masks of the VOC sample."""
    folder = sample_data / "voc_mini/VOCdevkit/VOC2012/SegmentationClassAug"
    covers, labels = [], []
    for path in sorted(folder.glob("*.png"))[::every]:
        side = 16 * GRID
        mask_HW = np.array(Image.open(path).resize((side, side), Image.Resampling.NEAREST))
        cells_NP = mask_HW.reshape(GRID, 16, GRID, 16).transpose(0, 2, 1, 3).reshape(GRID**2, 256)
        cover_NC = np.stack([(cells_NP == index).mean(1) for index in range(NUM_CLASSES + 1)], 1)
        if (cover_NC.mean(0)[1:] > 0.005).any():
            covers.append(cover_NC)
            labels.append(np.where((cells_NP == VOID).mean(1) > 0.5, VOID, cover_NC.argmax(1)))
    cover_BNC = torch.tensor(np.stack(covers), dtype=torch.float32)
    return Pictures(cover_BNC, torch.tensor(np.stack(labels)), cover_BNC.mean(1)[:, 1:] > 0.005)


def _noise(count: int, num_columns: int, deviation: float, generator: torch.Generator) -> Tensor:
    """B x N x K, half of it shared with the neighbouring patches."""
    white = torch.randn(count, num_columns, GRID, GRID, generator=generator)
    mixed = white / white.std() + 1.7 * (smooth := _blur(white, 1)) / smooth.std()
    return deviation * (mixed / mixed.std()).flatten(2).mT


def _blur(map_BKhw: Tensor, radius: int) -> Tensor:
    padded = functional.pad(map_BKhw, (radius,) * 4, mode="replicate")
    return functional.avg_pool2d(padded, 2 * radius + 1, 1)


def similarity(pictures: Pictures, *, contrast: float, prompts: int, leak: float, noise: float, seed: int) -> Tensor:
    """Cosines B x N x (20 + 25)."""
    generator = torch.Generator().manual_seed(seed)
    count, cover_BChw = len(pictures.labels_BC), pictures.cover_BNC.mT.unflatten(2, (GRID, GRID))
    cosine_BNK = 0.17 + _noise(count, NUM_CLASSES + NUM_PROMPTS, noise, generator)
    seen_BNC = (1 - leak) * pictures.cover_BNC[:, :, 1:] + leak * _blur(cover_BChw, 2).flatten(2).mT[:, :, 1:]
    cosine_BNK[:, :, :NUM_CLASSES] += (0.03 + contrast * seen_BNC) * pictures.labels_BC[:, None, :]
    centre_N2 = torch.cartesian_prod(torch.arange(GRID) + 0.5, torch.arange(GRID) + 0.5)
    for image in range(count):
        points_P2 = GRID * torch.rand(prompts, 2, generator=generator)
        owner_N = torch.cdist(centre_N2, points_P2).argmin(1)
        region_PN = functional.one_hot(owner_N, prompts).T * pictures.cover_BNC[image, :, 0]
        region_PN = _blur(region_PN.unflatten(1, (GRID, GRID))[None], 1)[0].flatten(1)
        names = NUM_CLASSES + torch.randperm(NUM_PROMPTS, generator=generator)[:prompts]
        cosine_BNK[image][:, names] += 0.03 + 0.7 * contrast * region_PN.T
    return cosine_BNK


def affinities(pictures: Pictures, *, seed: int) -> Affinities:
    """A_s from the overlap of classes, and its inverse with a strong diagonal, as the un-learned one has."""
    generator = torch.Generator().manual_seed(seed)
    centre_N2 = torch.cartesian_prod(torch.arange(float(GRID)), torch.arange(float(GRID)))
    noise_BNN = torch.randn(len(pictures.labels_BC), GRID**2, GRID**2, generator=generator)
    logit_BNN = 1.5 * pictures.cover_BNC @ pictures.cover_BNC.mT - torch.cdist(centre_N2, centre_N2) / 6
    logit_BNN = logit_BNN + 2 * torch.eye(GRID**2) + 0.15 * (noise_BNN + noise_BNN.mT)
    inverse_BNN = -0.5 * (logit_BNN - logit_BNN.mean((1, 2), keepdim=True)) + 4 * torch.eye(GRID**2)
    low, high = (symmetric_affinity(each.clamp(-5, 5).exp(), rounds=3) for each in (logit_BNN, inverse_BNN))
    return Affinities(low, high, None)


def miou_by_threshold(pictures: Pictures, cam_BNC: Tensor) -> dict[float, float]:
    """mIoU on patches in percent, background included, for each background threshold."""
    score_BN, class_BN = cam_BNC.masked_fill(~pictures.labels_BC[:, None, :], -1).max(-1)
    known_BN, found = pictures.label_BN != VOID, {}
    for threshold in THRESHOLDS:
        predicted_BN = torch.where(score_BN > threshold, class_BN + 1, 0)
        pair_P = (21 * pictures.label_BN + predicted_BN)[known_BN]
        confusion_CC = torch.bincount(pair_P, minlength=441).view(21, 21).double()
        truth_C, hit_C = confusion_CC.sum(1), confusion_CC.diagonal()
        iou_C = hit_C / (truth_C + confusion_CC.sum(0) - hit_C)
        found[threshold] = 100 * float(iou_C[truth_C > 0].mean())
    return found


def stage(**changes: object) -> SeedSettings:
    """The recipes' stage (conf/voc_dfa.yaml) at CLIP's scale of 100, with changes."""
    cam = config.load("voc_dfa", []).cam
    settings = SeedSettings(
        **{name: getattr(cam, name) for name in SeedSettings.__dataclass_fields__ if hasattr(cam, name)}
        | {"scale": 100.0, "max_iterations": cam.iterations}
    )
    return replace(settings, **changes)


STAGES: Mapping[str, SeedSettings] = {
    "similarity": stage(generator="similarity"),
    "affinity": stage(generator="affinity"),
    "transport": stage(),
    "transport, two propagations": stage(propagation=2),
    "transport, a constant column": stage(columns="constant"),
    "transport, a column each prompt": stage(columns="prompts"),
    "first reading of the print": stage(
        columns="prompts", marginal="softmax_mean", marginal_temperature=0.5, normalization="column"
    ),
    "print": stage(columns="prompts", marginal="softmax_sum", marginal_temperature=1.0, normalization="column"),
}


def _lines(pictures: Pictures, threshold: float, names: Sequence[str], **problem: float) -> list[str]:
    values = {"contrast": 0.04, "prompts": 3, "leak": 0.5, "noise": 0.01, "seed": 0} | problem
    cosine_BNK, made = similarity(pictures, **values), affinities(pictures, seed=0)  # type: ignore[arg-type]
    lines = []
    for name in names:
        scores = miou_by_threshold(pictures, make_seeds(cosine_BNK, pictures.labels_BC, made, STAGES[name]).cam_BNC)
        best = max(scores, key=scores.__getitem__)
        lines.append(f"  {name:32s} {scores[threshold]:5.1f}   best {scores[best]:5.1f} at {best}")
    return lines


def main() -> None:
    """Print the tables."""
    pictures, threshold = read_pictures(Path(os.environ["DFA_SAMPLE_DATA"])), config.load("voc_dfa", []).cam.threshold
    print(f"{len(pictures.labels_BC)} photographs, mIoU on patches at the recipes' threshold {threshold}")
    for contrast, leak, noise in ((0.06, 0.3, 0.008), (0.04, 0.5, 0.01), (0.02, 0.5, 0.01)):
        for prompts in (1, 3, 12):
            print(f"contrast {contrast}, {prompts} true prompts")
            lines = _lines(
                pictures, threshold, list(STAGES), contrast=contrast, prompts=prompts, leak=leak, noise=noise
            )
            print(*lines, sep="\n", flush=True)
    short = ["affinity", "transport", "first reading of the print"]
    for leak in (0.0, 0.3, 0.8):
        print(f"leak {leak}", *_lines(pictures, threshold, short, leak=leak), sep="\n", flush=True)
    area_B = 1 - pictures.cover_BNC[:, :, 0].mean(1)
    for low, high in ((0.0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1.0)):
        part = pictures[(area_B >= low) & (area_B < high)]
        print(f"foreground {low} to {high}, {len(part.labels_BC)} images", flush=True)
        print(*_lines(part, threshold, short), sep="\n", flush=True)
    part = pictures[pictures.labels_BC.sum(1) > 1]
    print(f"several classes, {len(part.labels_BC)} images", *_lines(part, threshold, short), sep="\n")


if __name__ == "__main__":
    main()
