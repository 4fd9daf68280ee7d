"""The student: everything that is trained, and nothing that is frozen."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfa.core.affinity import PairLogit, PairSource, both_logits, inverse_attention, pair_channels
from dfa.model.decoder import Decoder


@dataclass(frozen=True)
class Outputs:
    """logits_BChw: C + 1 classes, background first, on the patch grid. fused_BDhw: F_d (METHOD 1.6).
    low_logit_BNN, high_logit_BNN: the learnable affinities' logits, symmetric (METHOD 1.4)."""

    logits_BChw: Tensor
    fused_BDhw: Tensor
    low_logit_BNN: Tensor
    high_logit_BNN: Tensor


class Student(nn.Module):
    """Decoder and the two learnable affinities, `MLP(W)` and `MLP_inv(W_inv)` (METHOD 1.4, 1.20).

    low, high: `PairLogit` for as many channels as `pair_channels` gives with `source`, and one more for each block of a second
    encoder, whose tokens' cosines are feature channels too, whatever `source` is. The frozen encoder is no part of
    it, so that optimizer and checkpoints hold trained weights alone.
    """

    def __init__(self, decoder: Decoder, low: PairLogit, high: PairLogit, *, source: PairSource) -> None:
        super().__init__()
        self.decoder, self.low, self.high = decoder, low, high
        self.source: PairSource = source

    def forward(
        self,
        tokens_BLND: Tensor,
        attention_BLNN: Tensor,
        grid: tuple[int, int],
        second_BMNE: Tensor | None = None,
    ) -> Outputs:
        """tokens, attention and second tokens as `dfa.clip.Features` has them; their L may differ."""
        fused_BDhw, logits_BChw = self.decoder(tokens_BLND, grid)
        low_BNN, high_BNN = self.pair_logits(tokens_BLND, attention_BLNN, second_BMNE)
        return Outputs(logits_BChw, fused_BDhw, low_BNN, high_BNN)

    def segment(self, tokens_BLND: Tensor, grid: tuple[int, int]) -> Tensor:
        """Logits B x (C + 1) x h x w alone, for inference: no N x N map is made."""
        return self.decoder(tokens_BLND, grid)[1]

    def pair_logits(
        self, tokens_BLND: Tensor, attention_BLNN: Tensor, second_BMNE: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(low, high) logits B x N x N without the decoder, for the CAM. Without gradient a faster way to the same."""
        compared_BXND = self._compared(tokens_BLND, second_BMNE)
        if not torch.is_grad_enabled():
            return both_logits(self.low, self.high, attention_BLNN, compared_BXND)
        channels_BXNN, inverse_BXNN = _channels(attention_BLNN, compared_BXND)
        return self.low(channels_BXNN), self.high(inverse_BXNN)

    @torch.no_grad()
    def unlearned_logits(
        self, tokens_BLND: Tensor, attention_BLNN: Tensor, second_BMNE: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What `pair_logits` gave before the first step: the un-learned A_s and A_inv (METHOD 1.3)."""
        compared_BXND = self._compared(tokens_BLND, second_BMNE)
        channels_BXNN, inverse_BXNN = _channels(attention_BLNN, compared_BXND)
        return self.low.unlearned(channels_BXNN), self.high.unlearned(inverse_BXNN)

    def _compared(self, tokens_BLND: Tensor, second_BMNE: Tensor | None) -> Tensor | None:
        """The tokens whose cosines are feature channels, those of both encoders as wide as the wider one: zeros behind a token
        change no cosine."""
        own_BLND = tokens_BLND if self.source == "attention+features" else None
        if own_BLND is None or second_BMNE is None:
            return own_BLND if second_BMNE is None else second_BMNE
        width = max(own_BLND.shape[-1], second_BMNE.shape[-1])
        return torch.cat(
            [nn.functional.pad(each.float(), (0, width - each.shape[-1])) for each in (own_BLND, second_BMNE)], dim=1
        )

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trained weights by the learning rate that they want: "decoder" and "affinity"."""
        return {
            "decoder": list(self.decoder.parameters()),
            "affinity": [*self.low.parameters(), *self.high.parameters()],
        }


def _channels(attention_BLNN: Tensor, compared_BXND: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the low and the high map read; the cosines serve both."""
    source: PairSource = "attention" if compared_BXND is None else "attention+features"
    channels_BXNN = pair_channels(attention_BLNN, compared_BXND, source=source)
    inverse_BLNN = inverse_attention(attention_BLNN)
    features_BXNN = channels_BXNN[:, attention_BLNN.shape[1] :]
    inverse_BXNN = torch.cat([inverse_BLNN, features_BXNN], dim=1) if features_BXNN.shape[1] else inverse_BLNN
    return channels_BXNN, inverse_BXNN
