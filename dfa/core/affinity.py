"""Patch affinities: what the frozen attention knows about pairs of patches, and a small learnable map on top.

METHOD rows 1.3 to 1.5 (DFA, "Dual-path Frequency-domain Affinity Generation").
"""

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

PairSource = Literal["attention", "attention+features"]
Prior = Literal["low", "high", "high_as_low"]

# Pairs handled at once: the hidden layer of a chunk stays in the processor's cache, or fills an accelerator.
_CHUNK_CPU, _CHUNK_ACCELERATOR = 16_384, 1_048_576


def inverse_attention(attention_BLNN: Tensor) -> Tensor:
    """`W_inv = I_N - W`, the high-pass counterpart of attention (METHOD 1.3, DFA's `F^-1(I - F(W))`).

    attention_BLNN: any leading axes, rows are queries. Our reading: a row is a filter centred at its own query, whose all-pass is
    the delta at that query; the literal 2-D transform of the N x N matrix has its all-pass delta at [0, 0] alone.
    Entries are negative off the diagonal.

    >>> inverse_attention(torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    tensor([[ 0.2500, -0.2500],
            [-0.5000,  0.5000]])
    """
    inverse_BLNN = -attention_BLNN
    inverse_BLNN.diagonal(dim1=-2, dim2=-1).add_(1)
    return inverse_BLNN


def sinkhorn_normalize(weight_BNN: Tensor, *, rounds: int) -> Tensor:
    """Norm(.): columns, then rows, divided by their sums, `rounds` times (METHOD 1.5). Rows sum to 1, columns nearly.

    weight_BNN: entries >= 0, every row and column with a positive sum. Computed as `diag(r) W diag(c)`, in fp32 at least.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    with torch.autocast(weight_BNN.device.type, enabled=False):
        weight_BNN = weight_BNN if weight_BNN.dtype == torch.float64 else weight_BNN.float()
        row_BN1 = weight_BNN.new_ones(*weight_BNN.shape[:-1], 1)
        column_B1N = row_BN1.mT
        for _ in range(rounds):
            column_B1N = (row_BN1.mT @ weight_BNN).reciprocal()
            row_BN1 = (weight_BNN @ column_B1N.mT).reciprocal()
        return weight_BNN * column_B1N * row_BN1


def symmetric_affinity(weight_BNN: Tensor, *, rounds: int) -> Tensor:
    """`A = 1/2 (Norm(W) + Norm(W)^T)` (METHOD 1.5). For propagation; its entries are ~1/N, so losses take sigmoids instead."""
    normalized_BNN = sinkhorn_normalize(weight_BNN, rounds=rounds)
    return (normalized_BNN + normalized_BNN.mT).mul_(0.5)


def pair_channels(attention_BLNN: Tensor, tokens_BLND: Tensor | None, *, source: PairSource) -> Tensor:
    """Stacks what is known about each pair of patches: channels_BXNN.

    attention_BLNN: attention per block (or block x head), or its inverse. tokens_BLND: patch tokens per block, needed for
    `attention+features`, which appends one channel a block: the cosine of the two tokens after the mean token of the image is
    taken off, entries in [-1, 1] (METHOD 1b; the paper uses `attention`). No gradient: both come from the frozen encoder.
    """
    if source == "attention":
        return attention_BLNN.detach()
    if source != "attention+features":
        raise ValueError(f"source must be attention or attention+features, got {source!r}")
    if tokens_BLND is None:
        raise ValueError("source attention+features needs tokens_BLND, got None")
    with torch.no_grad(), torch.autocast(attention_BLNN.device.type, enabled=False):
        direction_BLND = _directions(tokens_BLND)
        cosine_BLNN = direction_BLND @ direction_BLND.mT
        return torch.cat([attention_BLNN.to(cosine_BLNN.dtype), cosine_BLNN], dim=1)


def _directions(tokens_BLND: Tensor) -> Tensor:
    tokens_BLND = tokens_BLND.float()
    return functional.normalize(tokens_BLND - tokens_BLND.mean(-2, keepdim=True), dim=-1)


class PairLogit(nn.Module):
    """The learnable `MLP(W)`: one logit per pair of patches from its channels (METHOD 1.4), 1x1 convolutions with a ReLU between.

    num_channels: X. The last num_feature_channels of them are cosines (`pair_channels` with features), the others attention or
    inverse attention, multiplied by N since their entries are ~1/N. The MLP reads them clipped to [-clip, clip], and
    `logit = scale * prior + bias + 1/2 (m + m^T)` with m its output. Its last layer starts at zero and scale at 1, so at step 0
    the logit is the prior, and `positive(logit)` keeps the order of the un-learned affinity. The prior, of `a`, the symmetrised mean
    of the attention channels (times N), and `c`, the symmetrised mean cosine (0 where there are none):

    - low: `log a + gain c` with log a clipped, so that `positive` returns `a e^(gain c)`: un-learned, the mean attention;
    - high: `a + gain c` with a clipped: I - W is far above 0 on the diagonal and -N W off it;
    - high_as_low: the channels are the inverse attention, the prior is that of the attention itself, `low`.

    Our reading throughout: the paper says MLP and no more. scale, bias and gain (starting at 1, 0 and 1) are learned too.
    No gradient reaches the channels. The hidden layer is never kept: it is computed again, chunk by chunk, in the backward pass.
    """

    def __init__(
        self, num_channels: int, *, hidden: int, clip: float, prior: Prior, num_feature_channels: int = 0
    ) -> None:
        super().__init__()
        if hidden < 1 or clip <= 0:
            raise ValueError(f"hidden must be at least 1 and clip above 0, got {hidden} and {clip}")
        if not 0 <= num_feature_channels < num_channels:
            raise ValueError(f"{num_feature_channels} feature channels of {num_channels} leave none for the attention")
        if prior not in get_args(Prior):
            raise ValueError(f"prior must be one of {get_args(Prior)}, got {prior!r}")
        self.num_channels, self.num_feature_channels = num_channels, num_feature_channels
        self.clip, self.prior = clip, prior
        self.first = nn.Linear(num_channels, hidden)
        self.last = nn.Linear(hidden, 1, bias=False)
        nn.init.zeros_(self.last.weight)
        # One element, not none: DeepSpeed cannot broadcast a parameter without axes between workers.
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))
        self.gain = nn.Parameter(torch.ones(1)) if num_feature_channels else None

    def forward(self, channels_BXNN: Tensor) -> Tensor:
        """channels_BXNN -> logit_BNN, symmetric, fp32 whatever surrounds it."""
        num_images, num_channels, num_patches, _ = channels_BXNN.shape
        if num_channels != self.num_channels:
            raise ValueError(f"{num_channels} pair channels given, {self.num_channels} expected")
        with torch.autocast(channels_BXNN.device.type, enabled=False):
            channels_BXNN = channels_BXNN.detach()
            multiplier_X = torch.ones(num_channels, device=channels_BXNN.device)
            multiplier_X[: num_channels - self.num_feature_channels] = num_patches
            weights = [weight.float() for weight in (self.first.weight, self.first.bias, self.last.weight)]
            output_BP = _PairwiseMlp.apply(channels_BXNN.flatten(2), multiplier_X, self.clip, *weights)
            output_BNN = output_BP.view(num_images, num_patches, num_patches)
            gain = 0.0 if self.gain is None else self.gain.float()
            prior_BNN = self.scale.float() * self._prior(channels_BXNN, gain=gain) + self.bias.float()
            return prior_BNN + 0.5 * (output_BNN + output_BNN.mT)

    def positive(self, logit_BNN: Tensor) -> Tensor:
        """`exp(clip(l))`, what Norm takes: entries in [e^-clip, e^clip]."""
        return logit_BNN.clamp(-self.clip, self.clip).exp_()

    def unlearned(self, channels_BXNN: Tensor) -> Tensor:
        """The logit that this module had before its first step: the prior alone, BNN. channels: see `forward`."""
        with torch.no_grad(), torch.autocast(channels_BXNN.device.type, enabled=False):
            return self._prior(channels_BXNN, gain=1.0)

    def _prior(self, channels_BXNN: Tensor, *, gain: Tensor | float) -> Tensor:
        num_patches, num_attention = channels_BXNN.shape[-1], self.num_channels - self.num_feature_channels
        mean_BNN = channels_BXNN[:, :num_attention].mean(1, dtype=torch.float32)
        mean_BNN = (0.5 * num_patches) * (mean_BNN + mean_BNN.mT)
        if self.prior == "high_as_low":
            mean_BNN = mean_BNN.neg_()
            mean_BNN.diagonal(dim1=-2, dim2=-1).add_(num_patches)
        if self.prior in ("low", "high_as_low"):
            # Below exp(-clip) everything is alike to `positive`; the floor also keeps log away from 0.
            mean_BNN = mean_BNN.clamp_min(torch.finfo(torch.float32).tiny).log()
        prior_BNN = mean_BNN.clamp(-self.clip, self.clip)
        if self.gain is None:
            return prior_BNN
        cosine_BNN = channels_BXNN[:, num_attention:].mean(1, dtype=torch.float32)
        return prior_BNN + (0.5 * gain) * (cosine_BNN + cosine_BNN.mT)


@torch.no_grad()
def both_logits(
    low: PairLogit, high: PairLogit, attention_BLNN: Tensor, tokens_BLND: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`low` of the attention and `high` of its inverse, B x N x N each, for inference: what their `forward` gives from
    `pair_channels`, without gradient and in about 0.6 of the time.

    tokens_BLND: for modules with feature channels, else None. Their `clip` must agree. Inverse attention is -W off the diagonal, so
    that both bands read the same channels, with the sign in high's weights; its N entries on the diagonal are computed apart. One
    image at a time: what is made of it stays in a processor's cache.
    """
    if low.clip != high.clip or low.num_feature_channels != high.num_feature_channels:
        raise ValueError("the two affinities must have one clip and the same feature channels")
    if (tokens_BLND is not None) != (low.num_feature_channels > 0):
        raise ValueError(f"{low.num_feature_channels} feature channels expected, tokens_BLND is {type(tokens_BLND)}")
    num_images, num_attention, num_patches, _ = attention_BLNN.shape
    given = num_attention + (0 if tokens_BLND is None else tokens_BLND.shape[1])
    if (low.num_channels, high.num_channels) != (given, given):
        raise ValueError(f"{given} pair channels given, {low.num_channels} and {high.num_channels} expected")
    with torch.autocast(attention_BLNN.device.type, enabled=False):
        logit_2BNN = torch.empty(2, num_images, num_patches, num_patches, device=attention_BLNN.device)
        for image in range(num_images):
            tokens_LND = None if tokens_BLND is None else tokens_BLND[image]
            _both_of_one(low, high, attention_BLNN[image].float(), tokens_LND, logit_2BNN[:, image])
    return logit_2BNN[0], logit_2BNN[1]


def _both_of_one(
    low: PairLogit, high: PairLogit, attention_LNN: Tensor, tokens_LND: Tensor | None, logit_2NN: Tensor
) -> None:
    num_attention, num_patches, _ = attention_LNN.shape
    # The last channel is 1: the bias is one more weight.
    x_XNN = attention_LNN.new_empty(low.num_channels + 1, num_patches, num_patches)
    x_XNN[-1] = 1
    torch.mul(attention_LNN, num_patches, out=x_XNN[:num_attention])
    mean_NN = x_XNN[:num_attention].sum(0)
    mean_NN = (mean_NN + mean_NN.T).mul_(0.5 / num_attention)
    mean_cosine_NN = None
    if tokens_LND is not None:
        direction_LND = _directions(tokens_LND)
        torch.bmm(direction_LND, direction_LND.mT, out=x_XNN[num_attention:-1])
        mean_cosine_NN = x_XNN[num_attention:-1].mean(0)
    x_XNN[:-1].clamp_(-low.clip, low.clip)
    diagonal_XN = x_XNN.diagonal(dim1=1, dim2=2).clone()
    diagonal_LN = num_patches * (1 - attention_LNN.diagonal(dim1=1, dim2=2))
    diagonal_XN[:num_attention] = diagonal_LN.clamp(-low.clip, low.clip)
    _both_mlps(low, high, x_XNN, diagonal_XN, num_attention, logit_2NN)
    # In place from here on: the maps of one image stay where they are.
    inverse_NN = mean_NN.neg()
    inverse_NN.diagonal().add_(num_patches)
    mean_NN.clamp_min_(torch.finfo(torch.float32).tiny).log_()
    if high.prior == "high_as_low":
        inverse_NN = mean_NN.clone()
    for pair, prior_NN, logit_NN in zip((low, high), (mean_NN, inverse_NN), logit_2NN, strict=True):
        if pair.gain is not None and mean_cosine_NN is not None:
            logit_NN.addcmul_(mean_cosine_NN, pair.scale.float() * pair.gain.float())
        logit_NN.copy_((logit_NN + logit_NN.T).mul_(0.5))
        logit_NN.addcmul_(prior_NN.clamp_(-pair.clip, pair.clip), pair.scale.float()).add_(pair.bias.float())


def _both_mlps(
    low: PairLogit, high: PairLogit, x_XNN: Tensor, diagonal_XN: Tensor, num_attention: int, output_2NN: Tensor
) -> None:
    """`w2 relu(W1 x + b1)` of both bands into output_2NN; the high band's x is negated in the attention channels, and on the
    diagonal it is diagonal_XN."""
    weight_low, weight_high = (
        torch.cat([pair.first.weight, pair.first.bias[:, None]], 1).float() for pair in (low, high)
    )
    sign_X = torch.ones_like(weight_high[0])
    sign_X[:num_attention] = -1
    weight_HX = torch.cat([weight_low, weight_high * sign_X])
    last_low, last_high = (pair.last.weight[0].float() for pair in (low, high))
    x_XP, output_2P = x_XNN.flatten(1), output_2NN.flatten(1)
    size = _CHUNK_CPU if x_XNN.device.type == "cpu" else _CHUNK_ACCELERATOR
    for x_part, output_part in zip(x_XP.split(size, 1), output_2P.split(size, 1), strict=True):
        hidden_HP = (weight_HX @ x_part).relu_()
        torch.mv(hidden_HP[: len(weight_low)].T, last_low, out=output_part[0])
        torch.mv(hidden_HP[len(weight_low) :].T, last_high, out=output_part[1])
    output_2NN[1].diagonal().copy_(last_high @ (weight_high @ diagonal_XN).relu_())


class _PairwiseMlp(torch.autograd.Function):
    """`w2 relu(W1 clamp(m x) + b1)` over the pairs of x_BXP, one chunk of pairs at a time.

    As plain modules, the hidden layer of 4 images of 400 patches (41 MB at width 16) goes to memory and back several times and
    is kept for the backward pass; this way it is four times as fast on a processor, and memory holds no more than the channels.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        x_BXP: Tensor,
        multiplier_X: Tensor,
        clip: float,
        weight: Tensor,
        bias: Tensor,
        last: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x_BXP, multiplier_X, weight, bias, last)
        ctx.clip = clip  # type: ignore[attr-defined]
        output_BP = torch.empty(x_BXP.shape[0], x_BXP.shape[2], device=x_BXP.device)
        for image, pairs, x_XP in _chunks(x_BXP, multiplier_X, clip):
            output_BP[image, pairs] = last[0] @ torch.addmm(bias[:, None], weight, x_XP).relu_()
        return output_BP

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient_BP: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_BXP, multiplier_X, weight, bias, last = ctx.saved_tensors  # type: ignore[attr-defined]
        weight_gradient, bias_gradient = torch.zeros_like(weight), torch.zeros_like(bias)
        last_gradient = torch.zeros_like(bias)
        with torch.autocast(x_BXP.device.type, enabled=False):
            for image, pairs, x_XP in _chunks(x_BXP, multiplier_X, ctx.clip):  # type: ignore[attr-defined]
                gradient_P = gradient_BP[image, pairs]
                hidden_HP = torch.addmm(bias[:, None], weight, x_XP).relu_()
                last_gradient += hidden_HP @ gradient_P
                # The sign of a rectified value is its derivative; last's factor is common to all pairs and waits outside.
                active_HP = hidden_HP.sign_().mul_(gradient_P)
                weight_gradient.addmm_(active_HP, x_XP.T)
                bias_gradient += active_HP.sum(1)
        return None, None, None, weight_gradient * last.T, bias_gradient * last[0], last_gradient[None]


def _chunks(x_BXP: Tensor, multiplier_X: Tensor, clip: float) -> Iterator[tuple[int, slice, Tensor]]:
    size = _CHUNK_CPU if x_BXP.device.type == "cpu" else _CHUNK_ACCELERATOR
    for image in range(x_BXP.shape[0]):
        for start in range(0, x_BXP.shape[2], size):
            pairs = slice(start, start + size)
            yield image, pairs, (x_BXP[image, :, pairs].float() * multiplier_X[:, None]).clamp_(-clip, clip)
