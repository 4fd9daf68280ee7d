import pytest
import torch

from dfa import build, config
from dfa.core.ffr import prototypes, select_tokens
from dfa.core.spectrum import Band, split
from dfa.label.pseudo import gather_present, patch_labels, present_classes
from dfa.train.checkpoint import CheckpointInfo, save_checkpoint
from dfa.train.objective import EngineState
from tests.train.test_step import OVERRIDES, SEGMENTATION, make_batch, make_step, online_labels, total, with_labels

PARTS = [*SEGMENTATION, *(f"high_{name}" for name in SEGMENTATION), "feature_rectification", "intermediate_classifier"]
FFR = ["method=ffr", "decoder.depth=2"]


def made(step, batch=None):
    return {part.name: part for part in step(batch or make_batch())}


def touched(step, name):
    """Where the gradient of one part of the loss arrives."""
    step.zero_grad(set_to_none=True)
    made(step)[name].total.backward()
    names = {
        key.removeprefix("student.decoder.")
        for key, p in step.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    return {".".join(name.split(".")[:2]) if name.startswith("blocks") else name.split(".")[0] for name in names}


def test_the_parts_have_the_published_weights_and_dfa_s_come_on_top():
    found = made(make_step(*FFR))
    assert list(found) == PARTS
    assert [part.weight for part in found.values()] == [0.5, 0.5, 1.0, 1.0, 1.0, 1.0]  # lambda_h 2, lambda_1 1
    both = list(made(make_step("method=dfa+ffr", "decoder.depth=2")))
    assert both == [*PARTS, "alignment", "rectification_positive", "rectification_negative"]


def test_the_first_head_is_trained_as_without_ffr():
    plain, step = make_step("decoder.depth=2"), make_step(*FFR)
    for name, part in list(made(plain).items())[:2]:
        torch.testing.assert_close((part.total, part.count), (made(step)[name].total, made(step)[name].count))


def test_the_heads_share_their_first_block_and_their_last_layer():
    step = make_step(*FFR, "ffr.high_labels=same")
    first, second = touched(step, "segmentation_background"), touched(step, "high_segmentation_background")
    shared = {"reduce", "fuse", "blocks.0", "classify"}
    assert first == shared | {"blocks.1"} and second == shared | {"high_blocks"}


def test_the_affinities_learn_in_the_combined_method_only():
    assert {"student", "low", "high"}.isdisjoint(touched(make_step(*FFR), "segmentation_background"))
    step = make_step(*FFR)
    total(step(make_batch())).backward()
    assert all(
        p.grad is None for name, p in step.named_parameters() if name.startswith(("student.low", "student.high"))
    )
    step = make_step("method=dfa+ffr")
    total(step(make_batch())).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in step.student.low.parameters())


def test_the_rectification_reaches_what_makes_the_features_and_no_block_after_them():
    assert touched(make_step(*FFR, "ffr.deviations=0.5"), "feature_rectification") == {"reduce", "fuse"}


def test_the_rectification_is_that_of_the_selected_tokens():
    step, batch = make_step(*FFR, "ffr.deviations=0.5"), make_batch()
    features = step.segmenter.encode(batch.image_B3HW)
    fused = step.student.decoder.fused(features.tokens_BLND, features.grid).detach()
    low, _ = split(fused, Band(0.4, "half_width"))
    seeds = step.segmenter.seeds(features, batch.labels_BC)
    visible = patch_labels(batch.valid_BHW, features.grid).flatten(1)
    classes = present_classes(batch.labels_BC)
    cam = gather_present(seeds.cam_BNC, classes)
    found = prototypes(fused.flatten(2), cam, classes, visible, confidence=0.6, fallback_share=0.1)
    selected = select_tokens(fused.flatten(2), low.flatten(2), found, visible, deviations=0.5).any(1)
    assert selected[:2].any() and not selected[2].any()  # the third image has no class
    distance = 1 - torch.cosine_similarity(fused.flatten(2), low.flatten(2), dim=1)
    part = made(step, batch)["feature_rectification"]
    torch.testing.assert_close(part.total.detach(), distance[selected].sum(), atol=1e-4, rtol=1e-4)
    assert part.count == selected.sum()


@pytest.mark.long
def test_the_classifier_learns_the_image_level_labels_from_visible_patches():
    step, batch = make_step(*FFR), make_batch()
    part = made(step, batch)["intermediate_classifier"]
    assert part.count == 3 * 10  # every class of every image
    torch.testing.assert_close(part.total / part.count, torch.tensor(2.0).log())  # zeros know nothing
    assert touched(step, "intermediate_classifier") == {"classifier"}
    with torch.no_grad():
        step.classifier.weight.normal_()
        features = step.segmenter.encode(batch.image_B3HW)
        tokens = features.tokens_BLND[:, 2]  # the middle one of five
        tokens = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        visible = tokens.unflatten(1, (6, 6))[:, :, :5].flatten(1, 2)  # the last column of patches is padding
        pooled = (visible @ step.classifier.weight.T + step.classifier.bias).amax(1)
        expected = torch.nn.functional.multilabel_soft_margin_loss(pooled, batch.labels_BC.float())
        part = made(step, batch)["intermediate_classifier"]
        torch.testing.assert_close(part.total / part.count, expected, atol=1e-4, rtol=1e-4)
        step.classifier.weight.zero_()
    optimizer = torch.optim.AdamW(step.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        part = made(step, batch)["intermediate_classifier"]
        (part.total / part.count).backward()
        optimizer.step()
    assert part.total / part.count < 0.2


def test_the_second_head_learns_from_the_intermediate_maps():
    step, batch = make_step(*FFR), make_batch()
    seen = 3 * 48 * 40
    parts = made(step, batch)
    counts = [int(parts[f"high_{name}"].count) for name in SEGMENTATION]
    assert counts == [seen, 0]  # a classifier of zeros labels nothing
    with torch.no_grad():
        step.classifier.bias[[1, 4, 2]] = 1.0  # now every patch is every class
    parts = made(step, batch)
    assert [int(parts[f"high_{name}"].count) for name in SEGMENTATION] == [seen // 3, 2 * seen // 3]
    same = made(make_step(*FFR, "ffr.high_labels=same"), batch)
    for name in SEGMENTATION:
        assert same[name].count == same[f"high_{name}"].count


def test_offline_labels_supervise_the_first_head():
    batch, step = make_batch(), make_step(*FFR, "loss.supervision=labels")
    labels = online_labels(make_step("decoder.depth=2"), batch)
    parts, online = made(step, with_labels(batch, labels, [True] * 3)), made(make_step(*FFR), batch)
    for name in PARTS:
        torch.testing.assert_close(parts[name].total, online[name].total)


def test_every_parameter_is_in_one_group():
    step = make_step("method=dfa+ffr", "decoder.depth=2", "decoder.mixer=hybrid")
    grouped = [id(parameter) for group in step.parameter_groups() for parameter in group.parameters]
    assert sorted(grouped) == sorted(id(parameter) for parameter in step.parameters())


@pytest.mark.long
def test_a_few_steps_lower_the_loss():
    step, batch = make_step(*FFR, "ffr.high_labels=same"), make_batch()
    optimizer = torch.optim.AdamW(step.parameters(), lr=1e-3)
    first = total(step(batch)).item()
    for _ in range(15):
        optimizer.zero_grad()
        loss = total(step(batch))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * first


def test_a_checkpoint_of_ffr_serves_inference_like_any_other(tmp_path):
    settings = config.load("demo", [*OVERRIDES, *FFR, f"run={tmp_path}"])
    step = build.train_step(settings, torch.device("cpu"))
    with torch.no_grad():
        step.student.decoder.classify.bias.fill_(3)
    weights = {name: value.contiguous() for name, value in step.state_dict().items()}
    assert {name.split(".")[0] for name in weights} == {"student", "high_blocks", "classifier"}
    names = build.class_set(settings).names
    info = CheckpointInfo(1, 0, 0, None, 0, 1.0, names, build.model_description(settings))
    folder = save_checkpoint(tmp_path, EngineState(weights, {}, {}, 0, 1.0), {}, info)
    image = make_batch().image_B3HW
    wanted = step.eval().segmenter.logits(image, scales=(1.0,), flip=False)
    for built in (
        build.trained_segmenter(settings, torch.device("cpu"), "latest"),
        build.checkpoint_segmenter(folder, torch.device("cpu")),
    ):
        assert torch.equal(built.logits(image, scales=(1.0,), flip=False), wanted)


def test_the_bound_on_ground_truth_is_the_same_whatever_the_method():
    mask = torch.randint(0, 11, (3, 48, 48), dtype=torch.uint8)
    assert list(made(make_step(*FFR, "loss.supervision=masks"), make_batch(mask))) == SEGMENTATION


def test_what_ffr_cannot_do_is_said():
    with pytest.raises(ValueError, match=r"ffr.block is 9, allowed is 0 to the decoder's 5 blocks"):
        make_step(*FFR, "ffr.block=9")
