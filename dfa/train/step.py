"""One training step of DFA: batch in, parts of the loss out (METHOD 1.6-1.19)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dfa.core.metrics import confusion_matrix
from dfa.core.rectify import Student as AlignmentStudent
from dfa.core.rectify import (
    alignment_loss,
    quality_mask,
    rectification_loss,
    relations,
    reliable_masks,
    resolve_unreliable,
)
from dfa.core.spectrum import BandMeasure, split
from dfa.data.stream import Batch
from dfa.label.pseudo import PseudoSettings, patch_labels, pseudo_labels
from dfa.label.seed import make_seeds
from dfa.model.losses import segmentation_loss, upsample_logits
from dfa.model.segmenter import Segmenter
from dfa.model.student import Outputs
from dfa.train.objective import LossPart, Objective, ParameterGroup

_PAPER_GRID = 20
"""Patches per row of the paper's 320 px crops, to which its window belongs."""


@dataclass(frozen=True)
class StepSettings:
    """The tunable numbers of a step.

    mu, mu_as: the decoder's low band. relation_gain: contrast of the relations. window: METHOD 1.11's r on a grid of 20
    patches a row; scaled to the grid at hand. supervision: `pseudo` labels, or ground-truth `masks` (the supervised
    bound, which trains the decoder alone).
    """

    mu: float
    mu_as: BandMeasure
    relation_gain: float
    alignment: AlignmentStudent
    use_quality_mask: bool
    window: int
    resolve_unreliable: bool
    alignment_weight: float
    rectification_weight: float
    supervision: Literal["pseudo", "masks"]
    pseudo: PseudoSettings
    decoder_rate_scale: float
    affinity_rate_scale: float
    weight_decay: float


class TrainStep(Objective):
    """The student under its losses. CLIP is held by the segmenter, a plain object, and so is not registered."""

    def __init__(self, segmenter: Segmenter, settings: StepSettings, *, num_classes: int) -> None:
        super().__init__()
        self.student = segmenter.student
        self.segmenter, self.settings = segmenter, settings
        self.num_classes = num_classes + 1

    def parameter_groups(self) -> list[ParameterGroup]:
        """Decoder and affinities at their own rates; no weight decay on biases, norms and the affinities."""
        groups, settings = self.student.parameter_groups(), self.settings
        matrices = [each for each in groups["decoder"] if each.ndim > 1]
        vectors = [each for each in groups["decoder"] if each.ndim <= 1]
        decoder, affinity = settings.decoder_rate_scale, settings.affinity_rate_scale
        return [
            ParameterGroup("decoder", tuple(matrices), decoder, settings.weight_decay),
            ParameterGroup("decoder_vectors", tuple(vectors), decoder, 0.0),
            ParameterGroup("affinity", tuple(groups["affinity"]), affinity, 0.0),
        ]

    def forward(self, batch: Batch) -> list[LossPart]:
        """The parts of `L_seg + lambda_1 L_a + lambda_2 L_r` (METHOD 1.19)."""
        features = self.segmenter.encode(batch.image_B3HW)
        if self.settings.supervision == "masks":
            if batch.mask_BHW is None:
                raise ValueError("loss.supervision=masks needs shards with masks; write them with data.masks set")
            _, logits_BChw = self.student.decoder(features.tokens_BLND, features.grid)
            return _segmentation_parts(logits_BChw, batch.mask_BHW)
        outputs = self.student(features.tokens_BLND, features.attention_BLNN, features.grid)
        affinities = self.segmenter.affinities(outputs.low_logit_BNN, outputs.high_logit_BNN)
        seeds = make_seeds(features.similarity_BNK, batch.labels_BC, affinities, self.segmenter.seed)
        labels = pseudo_labels(
            seeds.cam_BNC,
            batch.labels_BC,
            batch.image_B3HW,
            features.grid,
            self.settings.pseudo,
            prompt_BN=seeds.background_BN,
            valid_BHW=batch.valid_BHW,
        )
        visible_BN = patch_labels(batch.valid_BHW, features.grid).flatten(1)
        return [
            *_segmentation_parts(outputs.logits_BChw, labels.mask_BHW),
            *self.affinity_parts(outputs, labels.patch_Bhw.flatten(1), visible_BN),
        ]

    def affinity_parts(self, outputs: Outputs, label_BN: Tensor, visible_BN: Tensor) -> list[LossPart]:
        """Alignment and rectification (METHOD 1.6-1.12); visible_BN is False where a patch is padding."""
        settings = self.settings
        low_BDhw, high_BDhw = split(outputs.fused_BDhw.detach(), mu=settings.mu, mu_as=settings.mu_as)
        teacher_BNN = relations(low_BDhw.flatten(2), gain=settings.relation_gain)
        selected_BNN = visible_BN[:, :, None] & visible_BN[:, None, :]
        if settings.use_quality_mask:
            dense_BNN, _ = quality_mask(teacher_BNN, torch.sigmoid(outputs.low_logit_BNN.detach()))
            selected_BNN = selected_BNN & dense_BNN
        alignment = alignment_loss(teacher_BNN, outputs.low_logit_BNN, selected_BNN, student=settings.alignment)
        relations_BNN = relations(high_BDhw.flatten(2), gain=settings.relation_gain)
        positive_BNN, negative_BNN, known_BNN = reliable_masks(relations_BNN, label_BN)
        if settings.resolve_unreliable:
            radius = round(settings.window * outputs.fused_BDhw.shape[-1] / _PAPER_GRID)
            positive_BNN, negative_BNN = resolve_unreliable(positive_BNN, negative_BNN, known_BNN, radius=radius)
        pulled, pushed = rectification_loss(torch.sigmoid(outputs.high_logit_BNN), positive_BNN, negative_BNN)
        return [
            LossPart("alignment", settings.alignment_weight, *alignment),
            LossPart("rectification_positive", settings.rectification_weight, *pulled),
            LossPart("rectification_negative", settings.rectification_weight, *pushed),
        ]

    @torch.no_grad()
    def validate(self, batch: Batch) -> Tensor:
        """Confusion matrix of the model alone, one scale, no CRF: quick, for curves and for choosing a checkpoint."""
        if batch.mask_BHW is None:
            raise ValueError("validation needs masks")
        logits_BCHW = self.segmenter.logits(batch.image_B3HW, scales=(1.0,), flip=False)
        return confusion_matrix(logits_BCHW.argmax(1), batch.mask_BHW, num_classes=self.num_classes)


def _segmentation_parts(logits_BChw: Tensor, target_BHW: Tensor) -> list[LossPart]:
    size = (target_BHW.shape[1], target_BHW.shape[2])
    background, foreground = segmentation_loss(upsample_logits(logits_BChw, size), target_BHW)
    return [
        LossPart("segmentation_background", 0.5, *background),
        LossPart("segmentation_foreground", 0.5, *foreground),
    ]
