"""Several CLIPs as one, against their own passes put together by hand."""

import pytest
import torch
import torch.nn.functional as F

from dfa import build
from dfa.clip import ClipEnsemble
from dfa.config import load as load_config
from tests.clip.models import WORDS, load, picture, write_model

CPU = torch.device("cpu")
PROMPTS, TEMPLATES = [["dog"], ["cat", "red cat"], ["tree"]], ["a photo of a {}"]


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Patches of 8 and of 4, three blocks and six, embeddings of 24 and 16, and logit scales of their own."""
    folder, made = tmp_path_factory.mktemp("clips"), []
    for number, (top, vision) in enumerate([({}, {}), ({"embed_dim": 16}, {"patch_size": 4, "layers": 6})]):
        (folder / str(number)).mkdir()
        made.append(load(write_model(folder / str(number), top=top, vision=vision), seed=number))
        made[-1].logit_scale = (10.0, 30.0)[number]
    return made


def options(**changes):
    given = {"token_blocks": (0, 1), "attention_blocks": (1, 2), "similarity": "surgery", "surgery_blocks": 2}
    return given | {"renormalize_rows": True} | changes


@pytest.mark.parametrize("similarity", ["raw", "value", "surgery"])
def test_logits_and_attention_are_averaged_on_the_grid_of_the_first_one(members, similarity):
    first, second = members
    both, image = ClipEnsemble(members), picture(2, 32, 48)
    bank = both.text_bank(PROMPTS, TEMPLATES)
    found = both.encode(image, bank, **options(similarity=similarity))
    one = first.encode(image, first.text_bank(PROMPTS, TEMPLATES), **options(similarity=similarity))
    smaller = F.interpolate(image / 255, (16, 24), mode="bilinear", antialias=True)  # 4 x 6 patches of 4 pixels
    other = second.encode(
        smaller,
        second.text_bank(PROMPTS, TEMPLATES),
        **options(token_blocks=0, attention_blocks=(3, 5), similarity=similarity, surgery_blocks=4),
    )
    assert found.grid == one.grid == other.grid == (4, 6)
    assert torch.equal(found.tokens_BLND, one.tokens_BLND)
    torch.testing.assert_close(found.attention_BLNN, (one.attention_BLNN + other.attention_BLNN) / 2)
    for name in ("similarity_BNK", "class_similarity_BK"):
        logits = (10 * getattr(one, name) + 30 * getattr(other, name)) / 2
        torch.testing.assert_close(both.logit_scale * getattr(found, name), logits)


def test_twice_the_same_clip_is_that_clip(members):
    first, image = members[0], picture(2, 40, 24)
    twice, bank = ClipEnsemble([first, first]), first.text_bank(PROMPTS, TEMPLATES)
    found = twice.encode(image, twice.text_bank(PROMPTS, TEMPLATES), **options(attention_blocks=2))
    alone = first.encode(image, bank, **options(attention_blocks=2))
    for name in ("tokens_BLND", "attention_BLNN", "similarity_BNK", "class_similarity_BK"):
        torch.testing.assert_close(getattr(found, name), getattr(alone, name))
    assert twice.logit_scale == pytest.approx(first.logit_scale)


def test_one_block_of_a_shallower_tower_stands_for_two(members):
    deep, shallow = members[1], members[0]  # six blocks and three: 3 and 4 stand at the depth of 2, 5 at that of 3
    image = picture(1, 32, 24)
    found = ClipEnsemble([deep, shallow]).encode(image, None, **options(attention_blocks=(2, 3, 4)))
    own = deep.encode(image, None, **options(attention_blocks=(2, 3, 4), similarity="raw")).attention_BLNN
    larger = F.interpolate(image / 255, (64, 48), mode="bilinear", antialias=True)
    other = shallow.encode(larger, None, **options(attention_blocks=(1, 2), similarity="raw")).attention_BLNN
    torch.testing.assert_close(found.attention_BLNN, (own + other[:, [0, 0, 1]]) / 2)


def test_the_others_do_nothing_where_only_tokens_are_asked_for(members, monkeypatch):
    both, image = ClipEnsemble(members), picture(1, 32, 32)
    monkeypatch.setattr(members[1], "encode", lambda *_, **__: pytest.fail("the second CLIP was asked"))
    found = both.encode(image, None, **options(attention_blocks=(), similarity="raw"))
    assert found.tokens_BLND.shape == (1, 2, 16, 32) and not found.attention_BLNN.numel()


def test_bad_ensembles_and_banks_are_told(members):
    with pytest.raises(ValueError, match="at least two, got 1"):
        ClipEnsemble(members[:1])
    bank = members[0].text_bank(PROMPTS, TEMPLATES)
    with pytest.raises(ValueError, match=r"text bank of shape \(3, 24\), expected \(columns, 40\)"):
        ClipEnsemble(members).encode(picture(), bank, **options())


def test_a_run_reads_several_and_its_masks_the_first_one_alone(tmp_path):
    other = write_model(tmp_path, vision={"patch_size": 16, "image_size": 64, "layers": 2}, vocabulary=WORDS)
    small = ["decoder.width=32", "decoder.depth=1"]
    config = load_config("demo", [*small, f"clip.others=[{other}@random]"])
    built, alone = build.segmenter(config, CPU), build.segmenter(load_config("demo", small), CPU)
    image, labels = picture(2, 40, 56), torch.eye(10, dtype=torch.bool)[:2]
    seeds, plain = (each.pixel_seeds(image, labels, scales=[1.0], flip=False).score_BMHW for each in (built, alone))
    assert seeds.isfinite().all() and not torch.allclose(seeds, plain, atol=1e-3)
    for each in (built, alone):
        each.student.eval()
    logits, wanted = (each.logits(image, scales=[1.0], flip=True) for each in (built, alone))
    assert torch.equal(logits, wanted)
    config.clip.others = ["ViT-L-14-quickgelu"]
    with pytest.raises(ValueError, match=r"'ViT-L-14-quickgelu', allowed is MODEL@CHECKPOINT"):
        build.segmenter(config, CPU)
