"""One training step of FFR, frequency feature rectification, alone or together with DFA's losses (METHOD 2)."""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from dfa.clip import Features
from dfa.core.cam import max_normalize
from dfa.core.ffr import feature_rectification_loss, prototypes, select_tokens
from dfa.core.spectrum import Band, split
from dfa.data.stream import Batch
from dfa.label.pseudo import gather_present, patch_labels, present_classes
from dfa.label.seed import Seeds
from dfa.model.segmenter import Segmenter
from dfa.model.student import Outputs
from dfa.train.objective import LossPart, ParameterGroup
from dfa.train.step import StepSettings, TrainStep, segmentation_parts


@dataclass(frozen=True)
class FfrSettings:
    """The tunable numbers of FFR; its bands are the step's.

    high_weight: lambda_h, of the second head. rectification_weight: lambda_1. classifier_weight: of the intermediate classifier.
    confidence, fallback_share: see `core.ffr.prototypes`; deviations: see `select_tokens`. block: which of the decoder's token
    blocks the intermediate classifier reads, 1-based; 0: the middle one. high_labels: what the second head learns from, the
    `intermediate` CAM or the `same` labels as the first. with_affinities: DFA's losses too.
    """

    high_weight: float
    rectification_weight: float
    classifier_weight: float
    confidence: float
    fallback_share: float
    deviations: float
    block: int
    high_labels: str
    with_affinities: bool


class FfrStep(TrainStep):
    """`L = L_s1 + lambda_h L_s2 + lambda_1 L_r` and the intermediate classifier's own loss (METHOD 2).

    Two heads: the decoder on F_d, which is also what inference uses, and the same on the high band of F_d with blocks of its own
    between. Our reading of "sharing the first and last layer": the first block and the classifier are shared, the others begin
    as copies. The intermediate classifier (supplement, 1) is a linear map of one block's frozen tokens, max-pooled, under the
    multi-label soft margin loss; it starts at zero, so that the second head sees background until it knows something. Only the
    student is kept for inference: checkpoints of both methods load alike.
    """

    def __init__(self, segmenter: Segmenter, settings: StepSettings, ffr: FfrSettings, *, num_classes: int) -> None:
        super().__init__(segmenter, settings, num_classes=num_classes)
        decoder = self.student.decoder
        if settings.supervision == "masks":
            raise ValueError("loss.supervision=masks trains the decoder alone, without FFR's losses")
        if not 0 <= ffr.block <= decoder.num_blocks:
            raise ValueError(f"ffr.block is {ffr.block}, allowed is 0 to the decoder's {decoder.num_blocks} blocks")
        if ffr.high_labels not in ("intermediate", "same"):
            raise ValueError(f"high_labels must be intermediate or same, got {ffr.high_labels!r}")
        self.ffr = ffr
        self.block = (ffr.block or (decoder.num_blocks + 1) // 2) - 1
        self.high_blocks = nn.ModuleList(copy.deepcopy(block) for block in decoder.blocks[1:])
        self.classifier = nn.Linear(decoder.token_width, num_classes, device=decoder.fuse.weight.device)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Those of DFA's step; the second head and the classifier learn at the decoder's rate."""
        own = [*self.high_blocks.parameters(), *self.classifier.parameters()]
        scale, decay = self.settings.decoder_rate_scale, self.settings.weight_decay
        return [
            *super().parameter_groups(),
            ParameterGroup("ffr", tuple(each for each in own if each.ndim > 1), scale, decay),
            ParameterGroup("ffr_vectors", tuple(each for each in own if each.ndim <= 1), scale, 0.0),
        ]

    def forward(self, batch: Batch) -> list[LossPart]:
        """The parts of the loss. Labels are those of DFA's step, from affinities that learn only where DFA's losses are on."""
        features = self.segmenter.encode(batch.image_B3HW)
        outputs = self._outputs(features)
        seeds = self.seeds(batch, features, outputs, slice(None))
        label_BHW = self.labels(
            batch,
            lambda rows: self.seed_labels(
                batch, Seeds(seeds.cam_BNC[rows], seeds.background_BN[rows]), features.grid, rows
            ),
        )
        visible_BN = patch_labels(batch.valid_BHW, features.grid).flatten(1)
        low_BDhw, high_BDhw = split(outputs.fused_BDhw, Band(self.settings.mu, self.settings.mu_as))
        score_BNC = self._intermediate_scores(features)
        high_label_BHW = label_BHW
        if self.ffr.high_labels == "intermediate":
            high_label_BHW = self.annotated(self._intermediate_labels(batch, score_BNC, features.grid), batch.valid_BHW)
        parts = [
            *segmentation_parts(outputs.logits_BChw, label_BHW),
            *self._high_parts(high_BDhw.to(outputs.fused_BDhw.dtype), high_label_BHW),
            self._rectification_part(outputs.fused_BDhw, low_BDhw, seeds, batch.labels_BC, visible_BN),
            self._classifier_part(score_BNC, batch.labels_BC, visible_BN),
        ]
        if self.ffr.with_affinities:
            parts += self.affinity_parts(outputs, patch_labels(label_BHW, features.grid).flatten(1), visible_BN)
        return parts

    def _outputs(self, features: Features) -> Outputs:
        decoder = self.student.decoder
        fused_BDhw = decoder.fused(features.tokens_BLND, features.grid)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.ffr.with_affinities):
            low_BNN, high_BNN = self.student.pair_logits(
                features.tokens_BLND, features.attention_BLNN, features.second_BMNE
            )
        return Outputs(decoder.decode(fused_BDhw), fused_BDhw, low_BNN, high_BNN)

    def _high_parts(self, high_BDhw: Tensor, label_BHW: Tensor) -> list[LossPart]:
        decoder = self.student.decoder
        logits_BChw = decoder.decode(high_BDhw, blocks=[*decoder.blocks[:1], *self.high_blocks])
        return [
            replace(part, name=f"high_{part.name}", weight=self.ffr.high_weight * part.weight)
            for part in segmentation_parts(logits_BChw, label_BHW)
        ]

    def _rectification_part(
        self, fused_BDhw: Tensor, low_BDhw: Tensor, seeds: Seeds, labels_BC: Tensor, visible_BN: Tensor
    ) -> LossPart:
        fused_BDN, low_BDN, class_BM = fused_BDhw.flatten(2), low_BDhw.detach().flatten(2), present_classes(labels_BC)
        prototype_BMD = prototypes(
            fused_BDN.detach(),
            gather_present(seeds.cam_BNC, class_BM),
            class_BM,
            visible_BN,
            confidence=self.ffr.confidence,
            fallback_share=self.ffr.fallback_share,
        )
        selected_BMN = select_tokens(
            fused_BDN.detach(), low_BDN, prototype_BMD, visible_BN, deviations=self.ffr.deviations
        )
        total, count = feature_rectification_loss(fused_BDN, low_BDN, selected_BMN)
        return LossPart("feature_rectification", self.ffr.rectification_weight, total, count)

    def _intermediate_scores(self, features: Features) -> Tensor:
        """Class scores of the patches from one block's tokens, B x N x C, in the tokens' own zero mean and unit variance."""
        tokens_BND = features.tokens_BLND[:, self.block].to(self.classifier.weight.dtype)
        return self.classifier(functional.layer_norm(tokens_BND, tokens_BND.shape[-1:])).float()

    def _classifier_part(self, score_BNC: Tensor, labels_BC: Tensor, visible_BN: Tensor) -> LossPart:
        """Multi-label soft margin of the strongest visible patch of each class; images that are all padding do not count."""
        seen_BC = visible_BN.any(1, keepdim=True).expand_as(labels_BC)
        pooled_BC = score_BNC.masked_fill(~visible_BN[:, :, None], -torch.inf).amax(1).where(seen_BC, 0.0)
        loss_BC = functional.binary_cross_entropy_with_logits(pooled_BC, labels_BC.float(), reduction="none")
        total, count = torch.where(seen_BC, loss_BC, 0.0).sum(), seen_BC.sum().float()
        return LossPart("intermediate_classifier", self.ffr.classifier_weight, total, count)

    @torch.no_grad()
    def _intermediate_labels(self, batch: Batch, score_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pseudo-labels from the classifier's maps. Our reading: it has no background prompts, so there a constant stands in."""
        cam_BNC = max_normalize(score_BNC.clamp_min(0) * batch.labels_BC[:, None, :])
        background_BN = cam_BNC.new_full(cam_BNC.shape[:2], self.settings.pseudo.threshold)
        return self.seed_labels(batch, Seeds(cam_BNC, background_BN), grid, slice(None))
