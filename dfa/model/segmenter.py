"""Frozen CLIP and student as one system: what training, labelling, evaluation and prediction share."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dfa.clip import ClipEnsemble, Features, FrozenClip, Similarity
from dfa.clip.encoder import SecondEncoder
from dfa.core.affinity import symmetric_affinity
from dfa.label.pseudo import gather_present, present_classes, to_grid
from dfa.label.seed import Affinities, Seeds, SeedSettings, make_seeds
from dfa.model.inference import NATIVE, InputSize, Merge, predict_together
from dfa.model.student import Student

# Patches that a processor encodes at once. More are no faster, and memory that the system has to hand out anew each time makes
# them slower: at 32 images of 441 patches by a quarter.
_PATCHES_AT_ONCE = 2048


@dataclass(frozen=True)
class EncoderSettings:
    """What the frozen pass returns (see `FrozenClip.encode`).

    token_blocks feed the decoder, attention_blocks the affinities: 0-based block numbers. The student's feature
    channels read the tokens of token_blocks. keep_heads: a map of attention for each head, not their mean.
    """

    token_blocks: tuple[int, ...]
    attention_blocks: tuple[int, ...]
    similarity: Similarity
    surgery_blocks: int
    keep_heads: bool = False


@dataclass(frozen=True)
class PixelSeeds:
    """Seeds at pixel size for the present classes alone.

    score_BMHW: fp32 in [0, 1], M the largest number of classes in one image. class_BM: index 1..C of each slot, 0 where
    unused. background_BHW: the background's map. logits_BCHW: the model's, C + 1 classes, or None.
    """

    score_BMHW: Tensor
    class_BM: Tensor
    background_BHW: Tensor
    logits_BCHW: Tensor | None = None


class Segmenter:
    """Images in, seeds and logits out.

    A plain object: it may be held by an nn.Module without registering CLIP's frozen weights.

    bank_KE: text bank, foreground classes first. second: an encoder whose tokens the affinities compare too. use_learned (may be
    set): whether seeds are made with the learned affinities or with the un-learned ones.
    """

    def __init__(
        self,
        clip: FrozenClip | ClipEnsemble,
        bank_KE: Tensor,
        student: Student,
        *,
        encoder: EncoderSettings,
        seed: SeedSettings,
        sinkhorn_rounds: int,
        second: SecondEncoder | None = None,
    ) -> None:
        self.clip, self.bank_KE, self.student, self.second = clip, bank_KE, student, second
        self.encoder, self.seed, self.sinkhorn_rounds = encoder, seed, sinkhorn_rounds
        self.use_learned = True

    @property
    def patch_size(self) -> int:
        """Images must be multiples of this many pixels."""
        return self.clip.patch_size[0]

    def encode(self, image_B3HW: Tensor, *, with_similarity: bool = True, with_attention: bool = True) -> Features:
        """The one frozen pass per image; everything below shares it (METHOD 1.1).

        Seeds read the similarity, the affinities the attention: what nobody will read can be left out, and is empty then.
        """
        features = self.clip.encode(
            image_B3HW,
            self.bank_KE if with_similarity else None,
            token_blocks=self.encoder.token_blocks,
            attention_blocks=self.encoder.attention_blocks if with_attention else (),
            similarity=self.encoder.similarity if with_similarity else "raw",
            surgery_blocks=self.encoder.surgery_blocks,
            renormalize_rows=True,
            keep_heads=self.encoder.keep_heads,
        )
        if self.second is None or not with_attention:
            return features
        return replace(features, second_BMNE=self.second.tokens(image_B3HW, features.grid))

    def affinities(self, low_logit_BNN: Tensor, high_logit_BNN: Tensor) -> Affinities:
        """A_la and A_ha from the learned logits, A_s and A_inv from un-learned ones; without gradient (METHOD 1.5, 1.13)."""
        with torch.no_grad():
            return Affinities(
                symmetric_affinity(self.student.low.positive(low_logit_BNN), rounds=self.sinkhorn_rounds),
                symmetric_affinity(self.student.high.positive(high_logit_BNN), rounds=self.sinkhorn_rounds),
                None if self.seed.form == "propagate" else torch.sigmoid(high_logit_BNN).mean(-1),
            )

    @torch.no_grad()
    def seeds(self, features: Features, labels_BC: Tensor) -> Seeds:
        """Seeds on the patch grid from features and image-level labels."""
        if self.seed.generator == "similarity":
            return make_seeds(features.similarity_BNK, labels_BC, None, self.seed)
        return make_seeds(features.similarity_BNK, labels_BC, self._each_affinities(features), self.seed)

    @torch.no_grad()
    def pixel_seeds(self, image_B3HW: Tensor, labels_BC: Tensor, *, scales: Sequence[float], flip: bool) -> PixelSeeds:
        """Seeds of whole images at pixel size: the mean over scales and mirrored copies (METHOD 1.18, 1.22)."""
        return self.pixel_seeds_together([image_B3HW], labels_BC, scales=scales, flip=flip, with_model=False)[0]

    @torch.no_grad()
    def pixel_seeds_together(
        self,
        groups: Sequence[Tensor],
        labels_BC: Tensor,
        *,
        scales: Sequence[float],
        flip: bool,
        with_model: bool,
        merge: Merge = "logits",
        input_size: InputSize = NATIVE,
    ) -> list[PixelSeeds]:
        """`pixel_seeds` of images of several sizes in the same forward passes (see `inference.size_class`).

        groups: B_g x 3 x H_g x W_g each; labels_BC: of all images, group after group. with_model: the model's logits at
        these scales too, from the same passes. merge: `logits` for the mean of the maps, or `max`.
        """
        class_BM = present_classes(labels_BC)
        num_slots = class_BM.shape[1]

        def maps(scaled_B3HW: Tensor, view: slice) -> Tensor:
            image = torch.arange(view.start, view.stop, device=labels_BC.device) % len(labels_BC)
            features = self.encode(scaled_B3HW, with_attention=self.seed.generator != "similarity")
            seeds = self.seeds(features, labels_BC[image])
            present_BNM = gather_present(seeds.cam_BNC, class_BM[image])
            maps_BMhw = to_grid(torch.cat([present_BNM, seeds.background_BN[:, :, None]], dim=2), features.grid)
            if not with_model:
                return maps_BMhw
            return torch.cat([maps_BMhw, self.student.segment(features.tokens_BLND, features.grid).float()], dim=1)

        merged = predict_together(
            groups,
            scales=scales,
            flip=flip,
            forward=self._in_parts(maps),
            multiple_of=self.patch_size,
            merge=merge,
            input_size=input_size,
        )
        parts = class_BM.split([len(group) for group in groups])
        return [
            PixelSeeds(
                map_BKHW[:, :num_slots],
                part_BM,
                map_BKHW[:, num_slots],
                map_BKHW[:, num_slots + 1 :] if with_model else None,
            )
            for map_BKHW, part_BM in zip(merged, parts, strict=True)
        ]

    @torch.no_grad()
    def logits(self, image_B3HW: Tensor, *, scales: Sequence[float], flip: bool) -> Tensor:
        """Class logits of whole images at pixel size, B x (C + 1) x H x W (METHOD 1.22)."""
        return self.logits_together([image_B3HW], scales=scales, flip=flip)[0]

    @torch.no_grad()
    def logits_together(
        self,
        groups: Sequence[Tensor],
        *,
        scales: Sequence[float],
        flip: bool,
        merge: Merge = "logits",
        input_size: InputSize = NATIVE,
    ) -> list[Tensor]:
        """`logits` of images of several sizes in the same forward passes: B_g x 3 x H_g x W_g each."""

        def forward(scaled_B3HW: Tensor, view: slice) -> Tensor:
            features = self.encode(scaled_B3HW, with_similarity=False, with_attention=False)
            return self.student.segment(features.tokens_BLND, features.grid)

        return predict_together(
            groups,
            scales=scales,
            flip=flip,
            forward=self._in_parts(forward),
            multiple_of=self.patch_size,
            merge=merge,
            input_size=input_size,
        )

    def _each_affinities(self, features: Features) -> Iterator[Affinities]:
        """On a processor image by image: the maps of pairs of one image stay in its cache."""
        size = 1 if features.attention_BLNN.device.type == "cpu" else len(features.attention_BLNN)
        second_BMNE, count = features.second_BMNE, len(features.attention_BLNN)
        for part in (slice(start, start + size) for start in range(0, count, size)):
            second = None if second_BMNE is None else second_BMNE[part]
            make = self.student.pair_logits if self.use_learned else self.student.unlearned_logits
            yield self.affinities(*make(features.tokens_BLND[part], features.attention_BLNN[part], second))

    def _in_parts(self, forward: Callable[[Tensor, slice], Tensor]) -> Callable[[Tensor], Tensor]:
        """`forward(views, their place)` of all views, on a processor in parts of _PATCHES_AT_ONCE."""

        def whole(view_B3HW: Tensor) -> Tensor:
            count, size = len(view_B3HW), len(view_B3HW)
            if self.bank_KE.device.type == "cpu":
                num_patches = view_B3HW.shape[-2] * view_B3HW.shape[-1] // self.patch_size**2
                size = max(1, _PATCHES_AT_ONCE // num_patches)
            parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
            return torch.cat([forward(view_B3HW[part], part) for part in parts])

        return whole
