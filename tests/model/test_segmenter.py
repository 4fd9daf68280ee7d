"""A batch of views may be cut anywhere: every image gets its own maps."""

import pytest
import torch

from dfa import build
from dfa.config import load


@pytest.mark.parametrize("patches_at_once", [pytest.param(1, marks=pytest.mark.long), 30, 10_000])
def test_an_image_s_maps_do_not_depend_on_its_batch_nor_on_the_parts_it_is_cut_into(patches_at_once, monkeypatch):
    monkeypatch.setattr("dfa.model.segmenter._PATCHES_AT_ONCE", patches_at_once)
    segmenter = build.segmenter(load("demo"), torch.device("cpu"))
    segmenter.student.eval()
    torch.manual_seed(0)
    for pair in (segmenter.student.low, segmenter.student.high):
        torch.nn.init.normal_(pair.last.weight, std=0.1)
    image = torch.rand(3, 3, 24, 32)
    labels = torch.zeros(3, 10, dtype=torch.bool)
    labels[0, 4] = labels[1, 2] = labels[1, 7] = True  # the last one has none
    options = {"scales": [1.0, 1.5], "flip": True}
    (seeds,) = segmenter.pixel_seeds_together([image], labels, **options, with_model=True)
    logits = segmenter.logits(image, **options)
    torch.testing.assert_close(seeds.logits_BCHW, logits, atol=1e-5, rtol=0)
    assert seeds.class_BM.tolist() == [[5, 0], [3, 8], [0, 0]]
    for row in range(3):
        one = slice(row, row + 1)
        alone = segmenter.pixel_seeds(image[one], labels[one], **options)
        slots = alone.class_BM.shape[1]
        # fp32; the min-max of columns propagated three times stretches their rounding
        torch.testing.assert_close(seeds.score_BMHW[one, :slots], alone.score_BMHW, atol=1e-4, rtol=0)
        torch.testing.assert_close(seeds.background_BHW[one], alone.background_BHW, atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[one], segmenter.logits(image[one], **options), atol=1e-5, rtol=0)


def test_what_is_left_out_of_the_frozen_pass_is_empty_and_changes_nothing_else():
    segmenter = build.segmenter(load("demo"), torch.device("cpu"))
    image = torch.rand(2, 3, 24, 32)
    full = segmenter.encode(image)
    for with_similarity, with_attention in ((False, False), (False, True), (True, False)):
        part = segmenter.encode(image, with_similarity=with_similarity, with_attention=with_attention)
        assert (part.similarity_BNK.shape[-1] > 0) == with_similarity
        assert (part.attention_BLNN.shape[1] > 0) == with_attention
        torch.testing.assert_close(part.tokens_BLND, full.tokens_BLND, rtol=0, atol=5e-5)  # another order of sums
        if with_similarity:
            torch.testing.assert_close(part.similarity_BNK, full.similarity_BNK, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(3, 3), (3, 200), (200, 5)])
def test_an_image_smaller_than_a_patch_or_very_narrow_has_seeds_and_logits_of_its_size(size):
    segmenter = build.segmenter(load("demo"), torch.device("cpu"))
    segmenter.student.eval()
    image, labels = torch.rand(1, 3, *size), torch.zeros(1, 10, dtype=torch.bool)
    labels[0, [1, 4]] = True
    seeds = segmenter.pixel_seeds(image, labels, scales=[1.0, 0.5], flip=True)
    logits = segmenter.logits(image, scales=[1.0, 0.5], flip=True)
    assert seeds.score_BMHW.shape == (1, 2, *size) and logits.shape == (1, 11, *size)
    assert seeds.score_BMHW.isfinite().all() and logits.isfinite().all()
