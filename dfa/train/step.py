"""One training step of DFA: batch in, parts of the loss out (METHOD 1.6-1.19)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dfa.clip import Features
from dfa.core.analysis.truncation import block_annotation
from dfa.core.metrics import confusion_matrix
from dfa.core.rectify import (
    Agreement,
    DenseRule,
    RectifiedPairs,
    Teacher,
    alignment_loss,
    dense_mask,
    rectification_loss,
    relations,
    reliable_masks,
    resolve_unreliable,
)
from dfa.core.rectify import Student as AlignmentStudent
from dfa.core.spectrum import Band, BandMeasure, split
from dfa.core.void import void_label
from dfa.data.stream import Batch
from dfa.label.pseudo import PseudoSettings, patch_labels, pseudo_labels
from dfa.label.seed import Seeds, make_seeds
from dfa.model.losses import PIXEL_LOGITS_AT_ONCE, patch_segmentation_loss
from dfa.model.segmenter import Segmenter
from dfa.model.student import Outputs
from dfa.train.objective import LossPart, Objective, ParameterGroup

Rows = Tensor | slice

_PAPER_GRID = 20
"""Patches per row of the paper's 320 px crops, to which its window belongs."""


@dataclass(frozen=True)
class StepSettings:
    """The tunable numbers of a step.

    mu, mu_as: the decoder's low band. relation_gain: contrast of the relations. window: METHOD 1.11's r on a grid of 20
    patches a row; scaled to the grid at hand. supervision: what Y is. `pseudo`: labels from the CAM of this very step;
    `labels`: the batch's offline pseudo-labels, of a first stage or refreshed beside this run; `masks`: ground truth (the
    supervised bound, which trains the decoder alone). annotation_grid: Y, whatever it is, becomes block-wise, so many blocks
    along each side of the crop (METHOD 3, block-wise annotation); 0: left as it is. use_from_step: steps before it make labels
    with the un-learned affinities, while the learned ones are trained. use_quality_mask: false takes every pair, whatever `dense`
    says. dense, dense_share, teacher, alignment, rectified_pairs, agreement: see `dfa.core.rectify`.
    """

    mu: float
    mu_as: BandMeasure
    relation_gain: float
    use_quality_mask: bool
    dense: DenseRule
    dense_share: float
    teacher: Teacher
    alignment: AlignmentStudent
    window: int
    resolve_unreliable: bool
    rectified_pairs: RectifiedPairs
    agreement: Agreement
    alignment_weight: float
    rectification_weight: float
    supervision: Literal["pseudo", "labels", "masks"]
    annotation_grid: int
    pseudo: PseudoSettings
    use_from_step: int
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
        self.void = void_label(num_classes)

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

    def begin_step(self, step: int) -> None:
        """The learned affinities make labels from `use_from_step` on."""
        self.segmenter.use_learned = step >= self.settings.use_from_step

    def forward(self, batch: Batch) -> list[LossPart]:
        """The parts of `L_seg + lambda_1 L_a + lambda_2 L_r` (METHOD 1.19).

        Our reading of an offline Y: it takes the online one's place in L_seg and, at each patch's centre, in L_r, sample
        by sample; a sample that has none (not labelled yet, or rejected there) is trained on the online Y. L_a reads no
        labels. The share of samples with an offline Y is reported as a part without weight, `labels_given`.
        """
        supervision = self.settings.supervision
        all_given = supervision == "labels" and batch.given_B is not None and bool(batch.given_B.all())
        features = self.segmenter.encode(
            batch.image_B3HW,
            with_similarity=supervision != "masks"
            and not all_given,  # it makes the labels of this step, and nothing else
            with_attention=supervision != "masks",
        )
        if self.settings.supervision == "masks":
            if batch.mask_BHW is None:
                raise ValueError("loss.supervision=masks needs shards with masks; write them with data.masks set")
            _, logits_BChw = self.student.decoder(features.tokens_BLND, features.grid)
            return segmentation_parts(logits_BChw, self.annotated(batch.mask_BHW, batch.valid_BHW))
        outputs = self.student(features.tokens_BLND, features.attention_BLNN, features.grid, features.second_BMNE)
        label_BHW = self.labels(
            batch, lambda rows: self.seed_labels(batch, self.seeds(batch, features, outputs, rows), features.grid, rows)
        )
        label_BN, visible_BN = (patch_labels(each, features.grid).flatten(1) for each in (label_BHW, batch.valid_BHW))
        return [
            *segmentation_parts(outputs.logits_BChw, label_BHW),
            *self.affinity_parts(outputs, label_BN, visible_BN),
            *_labels_given(batch, outputs.logits_BChw),
        ]

    def annotated(self, label_BHW: Tensor, valid_BHW: Tensor) -> Tensor:
        """Y in blocks where the settings say so. Padding stays void, whatever its block's centre is."""
        if not self.settings.annotation_grid:
            return label_BHW
        return block_annotation(label_BHW, grid=self.settings.annotation_grid).masked_fill(~valid_BHW, self.void)

    def labels(self, batch: Batch, online: Callable[[Rows], Tensor]) -> Tensor:
        """Y of each sample, int64 B x H x W, void on padding. `online` makes it for the samples that need it alone."""
        if self.settings.supervision == "pseudo":
            return self.annotated(online(slice(None)), batch.valid_BHW)
        if batch.mask_BHW is None or batch.given_B is None:
            raise ValueError("loss.supervision=labels needs batches with offline labels; give shards.labels")
        label_BHW = batch.mask_BHW.long().masked_fill(~batch.valid_BHW, self.void)
        rows_R = (~batch.given_B).nonzero()[:, 0]
        if len(rows_R):
            label_BHW[rows_R] = online(rows_R)
        return self.annotated(label_BHW, batch.valid_BHW)

    def seeds(self, batch: Batch, features: Features, outputs: Outputs, rows: Rows) -> Seeds:
        """Seeds of some samples of the batch by the student as it is now."""
        if self.segmenter.use_learned:
            logits = outputs.low_logit_BNN[rows], outputs.high_logit_BNN[rows]
        else:
            second = None if features.second_BMNE is None else features.second_BMNE[rows]
            student = self.segmenter.student
            logits = student.unlearned_logits(features.tokens_BLND[rows], features.attention_BLNN[rows], second)
        affinities = self.segmenter.affinities(*logits)
        return make_seeds(features.similarity_BNK[rows], batch.labels_BC[rows], affinities, self.segmenter.seed)

    def seed_labels(self, batch: Batch, seeds: Seeds, grid: tuple[int, int], rows: Rows) -> Tensor:
        """Pseudo-labels of these samples from their seeds, R x H x W."""
        return pseudo_labels(
            seeds.cam_BNC,
            batch.labels_BC[rows],
            batch.image_B3HW[rows],
            grid,
            self.settings.pseudo,
            prompt_BN=seeds.background_BN,
            valid_BHW=batch.valid_BHW[rows],
        ).mask_BHW

    def affinity_parts(self, outputs: Outputs, label_BN: Tensor, visible_BN: Tensor) -> list[LossPart]:
        """Alignment and rectification (METHOD 1.6-1.12); visible_BN is False where a patch is padding."""
        settings = self.settings
        low_BDhw, high_BDhw = split(outputs.fused_BDhw.detach(), Band(settings.mu, settings.mu_as))
        teacher_BNN = relations(low_BDhw.flatten(2), gain=settings.relation_gain)
        visible_BNN = visible_BN[:, :, None] & visible_BN[:, None, :]
        selected_BNN = visible_BNN
        if settings.use_quality_mask:
            probability_BNN = torch.sigmoid(outputs.low_logit_BNN.detach())
            selected_BNN = dense_mask(
                teacher_BNN, probability_BNN, visible_BNN, rule=settings.dense, share=settings.dense_share
            )
        alignment = alignment_loss(
            teacher_BNN,
            outputs.low_logit_BNN,
            selected_BNN,
            visible_BNN,
            teacher=settings.teacher,
            student=settings.alignment,
        )
        relations_BNN = relations(high_BDhw.flatten(2), gain=settings.relation_gain)
        positive_BNN, negative_BNN, known_BNN = reliable_masks(
            relations_BNN,
            label_BN,
            void=self.void,
            pairs=settings.rectified_pairs,
            agreement=settings.agreement,
        )
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
        images = max(1, PIXEL_LOGITS_AT_ONCE // (self.num_classes * batch.mask_BHW[0].numel()))
        confusion_CC = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64, device=batch.mask_BHW.device)
        for image_B3HW, mask_BHW in zip(batch.image_B3HW.split(images), batch.mask_BHW.split(images), strict=True):
            logits_BCHW = self.segmenter.logits(image_B3HW, scales=(1.0,), flip=False)
            confusion_CC += confusion_matrix(logits_BCHW.argmax(1), mask_BHW, num_classes=self.num_classes)
        return confusion_CC


def segmentation_parts(logits_BChw: Tensor, target_BHW: Tensor) -> list[LossPart]:
    """Both halves of L_seg for logits on the patch grid (METHOD 1.19)."""
    background, foreground = patch_segmentation_loss(logits_BChw, target_BHW)
    return [
        LossPart("segmentation_background", 0.5, *background),
        LossPart("segmentation_foreground", 0.5, *foreground),
    ]


def _labels_given(batch: Batch, like: Tensor) -> list[LossPart]:
    """Shows in the metrics whether labels from disk reach the training at all."""
    if batch.given_B is None:
        return []
    given, samples = (like.new_tensor(float(count)) for count in (batch.given_B.sum(), len(batch)))
    return [LossPart("labels_given", 0.0, given, samples)]
