import dataclasses

import pytest
import torch

from dfa import build, config
from dfa.data.stream import Batch

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
