import dataclasses
import json
import logging
import shutil

import pytest
import torch

from dfa import build, config
from dfa.data.offline import begin_generations
from dfa.data.shards import read_samples
from dfa.data.stream import Batch
from dfa.label.pseudo import pseudo_labels
from dfa.label.seed import make_seeds
from dfa.train.objective import global_loss
from tests.data.toy_labels import make_current, png, write_labels
from tests.train.toy import write_toy_shards

OVERRIDES = [
    "clip.checkpoint=random",
    "decoder.width=32",
    "decoder.depth=1",
    "decoder.dropout=0.0",
    "crop.size=48",
    "affinity.hidden=4",
    "pseudo.dilations=[1,2]",
]
SEGMENTATION = ["segmentation_background", "segmentation_foreground"]
PARTS = [*SEGMENTATION, "alignment", "rectification_positive", "rectification_negative"]


def make_step(*overrides):
    return build.train_step(config.load("demo", [*OVERRIDES, *overrides]), torch.device("cpu"))


def make_batch(mask=None):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 3, 48, 48), generator=generator, dtype=torch.uint8)
    labels = torch.zeros(3, 10, dtype=torch.bool)
    labels[0, [1, 4]] = labels[1, 2] = True  # the third image has no class
    valid = torch.ones(3, 48, 48, dtype=torch.bool)
    valid[:, :, 40:] = False
    return Batch(image, valid, labels, mask, ("a", "b", "c"), torch.zeros(3), torch.arange(3))


def total(parts):
    return sum(part.weight * part.total / part.count.clamp_min(1) for part in parts)


def test_the_frozen_clip_is_neither_trained_nor_saved():
    step = make_step()
    grouped = [parameter for group in step.parameter_groups() for parameter in group.parameters]
    assert {id(p) for p in grouped} == {id(p) for p in step.parameters()} and len(grouped) == len(
        list(step.parameters())
    )
    assert all(name.startswith("student.") for name in step.state_dict())
    before = {name: value.clone() for name, value in step.segmenter.clip.clip.state_dict().items()}
    total(step(make_batch())).backward()
    assert all(parameter.grad is None for parameter in step.segmenter.clip.clip.parameters())
    assert all(torch.equal(value, before[name]) for name, value in step.segmenter.clip.clip.state_dict().items())


def test_a_weakly_supervised_step_never_looks_at_a_mask():
    step = make_step()
    without = step(make_batch())
    mask = torch.randint(0, 11, (3, 48, 48), dtype=torch.uint8)
    with_mask = step(make_batch(mask))
    assert [part.name for part in without] == PARTS
    assert all(torch.equal(a.total, b.total) for a, b in zip(without, with_mask, strict=True))


def gradient_of(step, name):
    step.zero_grad(set_to_none=True)
    part = next(part for part in step(make_batch()) if part.name == name)
    part.total.backward()
    return {key.split(".")[1] for key, p in step.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_each_loss_reaches_its_own_part_of_the_student():
    # Teachers and pseudo-labels are detached: the alignment cannot bend the decoder to please the affinity.
    step = make_step()
    assert gradient_of(step, "alignment") == {"low"}
    assert gradient_of(step, "rectification_positive") == {"high"}
    assert gradient_of(step, "rectification_negative") == {"high"}
    assert gradient_of(step, "segmentation_background") == {"decoder"}


def bent(step):
    """The affinities far from where they began."""
    with torch.no_grad():
        for parameter in step.student.parameter_groups()["affinity"]:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return step


def test_learned_affinities_make_labels_from_their_step_on_and_learn_before_it():
    batch, unlearned = make_batch(), make_step()
    waiting = bent(make_step("affinity.use_from_step=5"))
    waiting.student.decoder.load_state_dict(unlearned.student.decoder.state_dict())

    def target(step):
        features = step.segmenter.encode(batch.image_B3HW)
        outputs = step.student(features.tokens_BLND, features.attention_BLNN, features.grid)
        return step.seeds(batch, features, outputs, slice(None)).cam_BNC

    waiting.begin_step(4)
    torch.testing.assert_close(target(waiting), target(unlearned), atol=1e-5, rtol=0)
    features = waiting.segmenter.encode(batch.image_B3HW)
    seeds = waiting.segmenter.seeds(features, batch.labels_BC)  # what the label factory makes, image by image
    # The min-max of columns that were propagated three times stretches their rounding.
    torch.testing.assert_close(seeds.cam_BNC, target(unlearned), atol=2e-3, rtol=0)
    assert gradient_of(waiting, "alignment") == {"low"}
    waiting.begin_step(5)
    assert (target(waiting) - target(unlearned)).abs().max() > 0.05


def test_every_head_is_a_channel_where_that_is_asked_for():
    step = make_step("affinity.heads=all", "affinity.source=attention")
    assert step.student.low.num_channels == 4 * make_step("affinity.source=attention").segmenter.clip.num_heads
    assert gradient_of(step, "alignment") == {"low"}
    with pytest.raises(ValueError, match=r"affinity\.heads=all needs one CLIP"):
        make_step("affinity.heads=all", "clip.others=[conf/tiny_clip.json@random]")


def test_padding_counts_in_no_loss():
    step, batch = make_step(), make_batch()
    parts = {part.name: part for part in step(batch)}
    segmented = parts["segmentation_background"].count + parts["segmentation_foreground"].count
    assert segmented == 3 * 48 * 40
    pairs = parts["rectification_positive"].count + parts["rectification_negative"].count
    assert pairs == 3 * (6 * 5) ** 2  # five of six patch columns are visible, every pair is resolved


def test_without_resolution_the_unreliable_pairs_count_nowhere():
    parts = {part.name: part for part in make_step("frequency.resolve_unreliable=false")(make_batch())}
    assert parts["rectification_positive"].count + parts["rectification_negative"].count < 3 * (6 * 5) ** 2


def test_an_image_without_classes_is_all_background():
    step = make_step()
    batch = make_batch()
    only = dataclasses.replace(
        batch,
        image_B3HW=batch.image_B3HW[2:],
        valid_BHW=batch.valid_BHW[2:],
        labels_BC=batch.labels_BC[2:],
        keys=("c",),
    )
    parts = {part.name: part for part in step(only)}
    assert parts["segmentation_foreground"].count == 0 and parts["segmentation_background"].count == 48 * 40


def test_training_on_masks_trains_the_decoder_alone():
    step = make_step("loss.supervision=masks")
    mask = torch.randint(0, 11, (3, 48, 48), dtype=torch.uint8)
    parts = step(make_batch(mask))
    assert [part.name for part in parts] == SEGMENTATION
    total(parts).backward()
    assert all(p.grad is None for name, p in step.named_parameters() if not name.startswith("student.decoder"))
    with pytest.raises(ValueError, match="needs shards with masks"):
        step(make_batch())


def online_labels(step, batch):
    """Y of the batch by the student's own CAM, every sample on its own."""
    features = step.segmenter.encode(batch.image_B3HW)
    logits = step.student.pair_logits(features.tokens_BLND, features.attention_BLNN)
    labels = []
    for i in range(len(batch)):
        affinities = step.segmenter.affinities(*(each[i : i + 1] for each in logits))
        present = batch.labels_BC[i : i + 1]
        seeds = make_seeds(features.similarity_BNK[i : i + 1], present, affinities, step.segmenter.seed)
        image, prompt = batch.image_B3HW[i : i + 1], seeds.background_BN
        found = pseudo_labels(seeds.cam_BNC, present, image, features.grid, step.settings.pseudo, prompt_BN=prompt)
        labels.append(found.mask_BHW[0])
    return torch.stack(labels).to(torch.uint8)


def assert_same_parts(found, wanted, tolerance=0.0):
    assert [part.name for part in found] == [*PARTS, "labels_given"]
    assert [part.name for part in wanted] == PARTS
    for a, b in zip(found, wanted, strict=False):
        torch.testing.assert_close((a.total, a.count), (b.total, b.count), rtol=tolerance, atol=0)


def with_labels(batch, mask, given):
    return dataclasses.replace(batch, mask_BHW=mask, given_B=torch.tensor(given))


def test_a_step_with_offline_labels_equals_the_step_that_makes_the_same_labels_online():
    batch, online = make_batch(), make_step()
    labels = online_labels(online, batch)
    assert len(labels.unique()) > 2 and not (labels[~batch.valid_BHW] == 255).any()  # the step itself voids padding
    offline = make_step("loss.supervision=labels")
    assert_same_parts(offline(with_labels(batch, labels, [True] * 3)), online(batch))


@pytest.mark.parametrize("given", [[True, True, False], [True, False, True], [False, False, False]])
def test_samples_without_an_offline_label_are_trained_on_their_online_one(given):
    refined = ["pseudo.iterations=60", "pseudo.dilations=[1,2,4]", "cam.threshold=0.5"]
    online, batch = make_step(*refined), make_batch()
    blocks = batch.image_B3HW[:, :, :7, :7].repeat_interleave(7, 2).repeat_interleave(7, 3)[:, :, :48, :48]
    # Blocks of one colour, which the refinement labels as wholes; the sample with two classes last.
    batch = dataclasses.replace(batch, image_B3HW=blocks, labels_BC=batch.labels_BC.flip(0))
    labels = online_labels(online, batch)
    labels[~torch.tensor(given)] = 255
    offline = make_step("loss.supervision=labels", *refined)
    # A batch of other size may sum in another order, and so may the maps in the losses' totals.
    assert_same_parts(offline(with_labels(batch, labels, given)), online(batch), tolerance=1e-5)


def test_offline_labels_decide_both_losses_that_read_labels():
    batch, offline = make_batch(), make_step("loss.supervision=labels")
    parts = {}
    for name, value in (("void", 255), ("background", 0), ("class", 3)):
        mask = torch.full((3, 48, 48), value, dtype=torch.uint8)
        parts[name] = {part.name: part for part in offline(with_labels(batch, mask, [True] * 3))}
    seen = 3 * 48 * 40
    counts = {name: [int(found[part].count) for part in SEGMENTATION] for name, found in parts.items()}
    assert counts == {"void": [0, 0], "background": [seen, 0], "class": [0, seen]}
    pairs = [sum(int(found[part].count) for part in PARTS[3:]) for found in parts.values()]
    assert pairs == [0, 3 * (6 * 5) ** 2, 3 * (6 * 5) ** 2]
    assert len({found["alignment"].total.item() for found in parts.values()}) == 1


def test_block_wise_annotation_is_what_every_kind_of_supervision_trains_on():
    mask = torch.randint(0, 11, (3, 48, 48), dtype=torch.uint8)
    batch = make_batch(mask)
    blocks = mask.view(3, 6, 8, 6, 8)[:, :, 4, :, 4]  # the pixel at each block's centre
    blocks = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    blocks[~batch.valid_BHW] = 255
    for supervision in ("masks", "labels"):
        found = make_step(f"loss.supervision={supervision}", "loss.annotation_grid=6")(
            with_labels(batch, mask, [True] * 3)
        )
        wanted = make_step(f"loss.supervision={supervision}")(with_labels(batch, blocks, [True] * 3))
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a.total, b.total) and torch.equal(a.count, b.count)
    plain, coarse = make_step(), make_step("loss.annotation_grid=3")
    labels = plain.annotated(online_labels(plain, batch), batch.valid_BHW)
    labels = coarse.annotated(labels.masked_fill(~batch.valid_BHW, 255), batch.valid_BHW)
    wanted = make_step("loss.supervision=labels")(with_labels(batch, labels, [True] * 3))
    assert_same_parts(wanted, coarse(batch), tolerance=1e-5)


def test_no_seed_is_made_where_every_sample_has_a_label(tmp_path):
    # Without background prompts no CAM can be made at all: a step that tries fails.
    classes = config.class_set("classes_world")
    path = tmp_path / "classes.yaml"
    path.write_text(json.dumps({"names": list(classes.names), "background": [], "templates": list(classes.templates)}))
    step, mask = make_step("loss.supervision=labels", f"data.classes={path}"), torch.zeros(3, 48, 48, dtype=torch.uint8)
    assert [part.name for part in step(with_labels(make_batch(), mask, [True] * 3))] == [*PARTS, "labels_given"]
    with pytest.raises(ValueError, match="leave none for the background"):
        step(with_labels(make_batch(), mask, [True, True, False]))


def test_the_share_of_samples_with_an_offline_label_is_reported_and_weighs_nothing():
    step, mask = make_step("loss.supervision=labels"), torch.zeros(3, 48, 48, dtype=torch.uint8)
    batch = with_labels(make_batch(), mask, [True, False, False])
    loss = global_loss(step(batch), batch)
    assert loss.means["labels_given"] == pytest.approx(1 / 3)
    without = global_loss([part for part in step(batch) if part.name != "labels_given"], batch)
    assert loss.value == without.value and torch.equal(loss.local, without.local)


def test_a_step_on_labels_refuses_a_batch_that_never_asked_for_them():
    mask = torch.zeros(3, 48, 48, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"loss.supervision=labels needs batches with offline labels"):
        make_step("loss.supervision=labels")(make_batch(mask))


@pytest.fixture
def shards(tmp_path):
    """Overrides of a run over toy shards, and their index."""
    index = write_toy_shards(tmp_path / "toy", num_samples=6, samples_per_shard=3)
    path = tmp_path / "classes.yaml"
    path.write_text(json.dumps({"names": list(index.class_names), "background": ["road"], "templates": ["{}"]}))
    return index, [*OVERRIDES, f"data.classes={path}", f"shards.train={index.root}", "train.workers=1"]


def test_a_run_on_labels_needs_labels_and_another_run_must_have_none(shards):
    _, overrides = shards
    with pytest.raises(ValueError, match=r"loss.supervision=labels needs shards.labels"):
        build.loop_plan(config.load("demo", [*overrides, "loss.supervision=labels"]))
    for supervision in ("pseudo", "masks"):
        wrong = [f"loss.supervision={supervision}", "shards.labels=labels"]
        with pytest.raises(ValueError, match=rf"shards.labels is 'labels' and loss.supervision is '{supervision}'"):
            build.loop_plan(config.load("demo", [*overrides, *wrong]))


def test_a_run_holds_finished_labels_against_its_shards_and_waits_for_others(shards, tmp_path, caplog):
    index, overrides = shards
    masks = {row.key: png(torch.zeros(16, 16).numpy()) for row in read_samples(index)}
    loaded = config.load("demo", [*overrides, "loss.supervision=labels", f"shards.labels={tmp_path}/labels"])
    with pytest.raises(ValueError, match=rf"{tmp_path}/labels is not there: it has neither finished labels"):
        build.loop_plan(loaded)
    begin_generations(str(tmp_path / "labels"))
    with caplog.at_level(logging.WARNING):
        build.loop_plan(loaded)
    assert f"{tmp_path}/labels holds no finished labels yet" in caplog.text
    write_labels(tmp_path / "labels/step-00000040", index, masks)
    make_current(tmp_path / "labels", "step-00000040")
    caplog.clear()
    build.loop_plan(loaded)
    assert "no finished labels" not in caplog.text
    shutil.rmtree(tmp_path / "labels")
    write_labels(tmp_path / "labels", index, masks, class_names=["cat", "hen", "owl"])
    with pytest.raises(ValueError, match=r"class 2 is 'hen' in the labels and 'dog' in the shards"):
        build.loop_plan(loaded)


def test_where_labels_are_refreshed_less_is_decoded_ahead(shards, tmp_path):
    index, overrides = shards
    write_labels(tmp_path / "labels/step-00000040", index, {})
    make_current(tmp_path / "labels", "step-00000040")
    windows = []
    for address in ("labels", "labels/step-00000040"):
        changes = ["loss.supervision=labels", f"shards.labels={tmp_path}/{address}"]
        windows.append(build.loop_plan(config.load("demo", [*overrides, *changes])).window_bytes)
    usual = build.loop_plan(config.load("demo", overrides)).window_bytes
    assert windows == [32 * 2**20, usual] and usual > 32 * 2**20


def test_a_few_steps_lower_the_loss():
    step, batch = make_step(), make_batch()
    optimizer = torch.optim.AdamW(step.parameters(), lr=1e-3)
    first = total(step(batch)).item()
    for _ in range(15):
        optimizer.zero_grad()
        loss = total(step(batch))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * first


def test_a_crop_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(ValueError, match=r"crop.size 50 is not a multiple of the encoder's patch, 8"):
        make_step("crop.size=50")


def test_validation_counts_every_pixel_that_is_not_void():
    step = make_step()
    mask = torch.zeros(3, 48, 48, dtype=torch.uint8)
    mask[:, :10] = 255
    confusion = step.validate(make_batch(mask))
    assert confusion.shape == (11, 11) and confusion.sum() == 3 * 38 * 48
