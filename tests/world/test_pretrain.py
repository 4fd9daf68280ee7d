import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from dfa.clip import build_clip, load_clip
from dfa.config import CONF
from dfa.world import pretrain
from dfa.world.measure import mean_average_precision, measure_clip
from dfa.world.pretrain import PretrainSettings

TINY = CONF / "tiny_clip.json"
WEIGHTS = CONF.parent / "dfa/world/tiny_clip.safetensors"


def test_the_model_lists_exactly_the_words_of_the_captions():
    assert json.loads(TINY.read_text())["vocabulary"] == pretrain.vocabulary()


def test_the_patch_embeddings_are_those_of_the_frozen_clip():
    torch.manual_seed(0)
    clip = build_clip(TINY).eval()
    image = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    with torch.no_grad():
        class_BE, (value_BNE, raw_BNE) = pretrain.image_embeddings(clip, image)
    frozen = load_clip(str(TINY), "random", device="cpu", precision="fp32")
    frozen.visual.load_state_dict(clip.visual.state_dict())
    bank = torch.nn.functional.normalize(torch.randn(4, 128), dim=-1)
    for kind, patch_BNE in (("raw", raw_BNE), ("value", value_BNE)):
        features = frozen.encode(image, bank, token_blocks=(), attention_blocks=(), similarity=kind, surgery_blocks=1)
        # fp32, two orders of summation
        assert torch.allclose(features.similarity_BNK, patch_BNE @ bank.T, atol=1e-5)
        assert torch.allclose(features.class_similarity_BK, class_BE @ bank.T, atol=1e-5)


def test_a_caption_is_positive_for_every_scene_of_which_it_is_true():
    settings = PretrainSettings(close_up_steps=0, scene_steps=1, scene_batch_size=12, mixed_share=0.0)
    batch = pretrain._Captioned(settings, 0).batch(0)
    texts, claims = pretrain._texts(batch.present_BK.numpy(), np.random.default_rng(0))
    for text, claim in zip(texts, claims, strict=True):
        named = {name for name in pretrain.NAMES if name in text.split()}
        assert named == {pretrain.NAMES[k] for k in np.flatnonzero(claim)}
    for row in range(12):
        present = batch.present_BK[row].numpy()
        own_caption = claims[len(pretrain.NAMES) + row]
        assert not (own_caption & ~present).any()


def test_each_patch_of_a_mixed_picture_answers_to_its_own_caption():
    settings = PretrainSettings(
        close_up_steps=0, scene_steps=1, scene_batch_size=8, mixed_share=0.5, erase_probability=0.0
    )
    batch = pretrain._Captioned(settings, 0).batch(0)
    pure = pretrain._Captioned(dataclasses.replace(settings, mixed_share=0.0), 0).batch(0)
    assert batch.num_mixed == 4 and torch.equal(batch.image_B3HW[:4], pure.image_B3HW[:4])
    for row in range(4, 8):
        own, other = pure.image_B3HW[row], pure.image_B3HW[row - 4]
        for patch in range(14 * 14):
            top, left = divmod(patch, 14)
            pixels = np.s_[:, 8 * top : 8 * top + 8, 8 * left : 8 * left + 8]
            foreign = torch.equal(batch.image_B3HW[row][pixels], other[pixels])
            assert foreign or torch.equal(batch.image_B3HW[row][pixels], own[pixels])
            names = pure.present_BK[row - 4] if foreign else pure.present_BK[row]
            assert torch.equal(batch.allowed_BNK[row, patch], names)


def test_patch_losses_equal_slow_loops():
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)
    present = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    allowed = torch.rand(3, 6, 4, generator=generator) > 0.5
    allowed[..., 0] = True
    presence = pretrain.presence_loss(similarity, present, (1, 3))
    exclusive = pretrain.exclusive_loss(similarity, allowed)
    found = {1: [], 3: []}
    absent, unexplained = [], []
    for b in range(3):
        probability = torch.softmax(similarity[b], -1)
        for n in range(6):
            unexplained.append(-math.log(sum(probability[n, k].item() for k in range(4) if allowed[b, n, k])))
        for k in range(4):
            best = sorted((probability[n, k].item() for n in range(6)), reverse=True)
            if present[b, k]:
                for count, values in found.items():
                    values.append(-math.log(sum(best[:count]) / count))
            else:
                absent.append(-math.log(1 - best[0]))
    expected = sum(np.mean(values) for values in found.values()) / 2 + np.mean(absent)
    assert presence.item() == pytest.approx(expected, rel=1e-9)
    assert exclusive.item() == pytest.approx(np.mean(unexplained), rel=1e-9)


@pytest.mark.long
def test_a_killed_pretraining_continues_to_the_same_weights(tmp_path):
    settings = PretrainSettings(
        close_up_steps=2, scene_steps=2, close_up_batch_size=2, scene_batch_size=2, checkpoint_every=2
    )
    whole = pretrain.pretrain(TINY, settings, tmp_path / "whole", compile_model=False)

    class Killed(Exception):
        pass

    saved = pretrain._save
    try:

        def save_then_die(*arguments):
            saved(*arguments)
            raise Killed

        pretrain._save = save_then_die
        with pytest.raises(Killed):
            pretrain.pretrain(TINY, settings, tmp_path / "cut", compile_model=False)
    finally:
        pretrain._save = saved
    resumed = pretrain.pretrain(TINY, settings, tmp_path / "cut", compile_model=False)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(ValueError, match="other settings"):
        pretrain.pretrain(TINY, PretrainSettings(seed=9), tmp_path / "cut", compile_model=False)


def test_mean_average_precision_equals_a_slow_loop():
    generator = torch.Generator().manual_seed(1)
    score, labels = torch.rand(20, 3, generator=generator), torch.rand(20, 3, generator=generator) > 0.6
    values = []
    for c in range(3):
        ranked = sorted(range(20), key=lambda i: -score[i, c].item())
        hits, precisions = 0, []
        for rank, i in enumerate(ranked, start=1):
            if labels[i, c]:
                hits += 1
                precisions.append(hits / rank)
        values.append(sum(precisions) / len(precisions))
    assert mean_average_precision(score, labels) == pytest.approx(sum(values) / 3, rel=1e-9)


@pytest.mark.long
def test_the_shipped_clip_classifies_and_localises_scenes_that_it_never_saw():
    assert WEIGHTS.stat().st_size < 3_000_000
    clip = load_clip(str(TINY), WEIGHTS, device="cpu", precision="fp32")
    thresholds = [0.02, *(round(0.05 * step, 2) for step in range(1, 20))]
    scores = measure_clip(clip, pretrain.TEMPLATES[0], seed=77, num_scenes=150, thresholds=thresholds)
    assert scores["mean_average_precision"] >= 0.90
    assert scores["seed_miou_raw"] >= 45
    assert scores["seed_miou_value"] >= 45
