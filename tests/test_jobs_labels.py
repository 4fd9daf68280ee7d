"""pseudo_label and evaluate on a few scenes with random weights: the numbers against torchmetrics on what they wrote."""

import copy
import io
import json
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassConfusionMatrix

from dfa import build
from dfa.config import load
from dfa.data.offline import resolve
from dfa.data.shards import read_shard
from dfa.label.work import LocalPool
from dfa.world.folder import write_voc
from jobs import evaluate, pseudo_label, train
from tests.scores import mean_iou, miou_of_files
from tests.small_runs import untrained_checkpoint, write_shards

NUM_CLASSES = 11


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return _small_run(tmp_path_factory.mktemp("labels"), per_shard=4)


def _small_run(root, *, per_shard):
    """Six training and four validation scenes, a random CLIP and an untrained student as a checkpoint."""
    paths = [f"run={root}/run", f"shards.train={root}/train", f"shards.val={root}/val"]
    small = ["decoder.width=32", "decoder.depth=1", "evaluate.scales=[1.0]", "label.batch_size=4"]
    config = load("demo", ["clip.checkpoint=random", *paths, *small])
    config.data.root = str(write_voc(root / "world", seed=1, num_train=6, num_val=4))
    for split in ("train", "val"):
        write_shards(config, getattr(config.shards, split), split, samples_per_shard=per_shard)
    untrained_checkpoint(config)
    return config


def _expected_miou(labels: Path, images: str) -> float:
    return miou_of_files(labels, images, NUM_CLASSES)


def test_evaluate_reuses_the_labels_and_scores_them_exactly(config):
    labelled = pseudo_label.work(config, LocalPool())
    assert (labelled["num_images"], labelled["labelled_now"]) == (6, 6)
    assert sum(labelled["pixel_share"].values()) + labelled["void_share"] == pytest.approx(1, abs=1e-4)  # rounded
    written = {path: path.stat().st_mtime_ns for path in Path(labelled["labels"]).glob("*.tar")}
    result = evaluate.work(config, LocalPool())
    assert {path: path.stat().st_mtime_ns for path in written} == written
    run = Path(config.run)
    assert json.loads((run / "evaluate.json").read_text()) == result
    # Both are rounded to two decimals.
    assert result["mask_miou"] == pytest.approx(_expected_miou(run / "labels/train", config.shards.train), abs=0.006)
    assert result["val_miou"] == pytest.approx(_expected_miou(run / "predictions/val", config.shards.val), abs=0.006)
    assert result["mask_miou"] == labelled["mask_miou"]
    assert result["seed_miou"] == max(miou for _, miou in result["seed_curve"])
    assert [result["seed_threshold"], result["seed_miou"]] in result["seed_curve"]
    columns = [row["mask"] for row in result["per_class"].values() if row["mask"] is not None]
    assert np.mean(columns) == pytest.approx(result["mask_miou"], abs=0.02)


def test_the_seed_of_the_factory_is_the_segmenters_own(config):
    """The curve at the configured threshold, recomputed one image at a time."""
    config.evaluate.parts = ["seed"]
    try:
        result = evaluate.work(config, LocalPool())
    finally:
        config.evaluate.parts = ["seed", "mask", "val"]
    segmenter = build.trained_segmenter(config, torch.device("cpu"))
    metric = MulticlassConfusionMatrix(NUM_CLASSES, ignore_index=255)
    for shard in build.index(config, "train").shards:
        for one in read_shard(f"{config.shards.train}/{shard.name}"):
            image, truth = (
                torch.from_numpy(np.array(Image.open(io.BytesIO(data))).astype(np.int64))
                for data in (one.image, one.mask)
            )
            labels_BC = torch.zeros(1, NUM_CLASSES - 1, dtype=torch.bool)
            labels_BC[0, [index - 1 for index in one.labels]] = True
            seeds = segmenter.pixel_seeds(image.byte().permute(2, 0, 1)[None], labels_BC, scales=[1.0], flip=True)
            best, slot = seeds.score_BMHW[0].max(0)
            metric.update(torch.where(best > 0.4, torch.tensor(one.labels)[slot], 0), truth)
    expected = mean_iou(metric.compute())
    # Rounding of batched against single products may move a pixel at the threshold: 1 of 75 000 is .01 % of a class.
    assert dict(map(tuple, result["seed_curve"]))[0.4] == pytest.approx(expected, abs=0.05)


def _checkpoint(config, step, val_miou):
    """A checkpoint of `step` batches whose student depends on its number."""
    config = copy.deepcopy(config)
    config.train.seed = step
    untrained_checkpoint(config, step=step, samples_seen=step * config.train.batch_size, val_miou=val_miou)


def test_following_labels_with_each_better_checkpoint_until_training_ends(config, tmp_path):
    config = copy.deepcopy(config)
    config.run = str(tmp_path / "run")
    training = copy.deepcopy(config)
    training.train.steps = 4  # the follower's own configuration says 240
    config.label.follow, config.label.follow_interval_s, config.label.worst = True, 0.1, 0
    config.label.unary, config.label.checkpoint = "model", "best"  # an untrained affinity does not depend on its seed
    root = tmp_path / "run/labels/train_follow"
    results = []
    follower = threading.Thread(target=lambda: results.append(pseudo_label.work(config, LocalPool())))
    follower.start()
    _wait_for(lambda: (root / "current.json").exists())
    assert resolve(str(root)) is None  # a training that starts now has no offline labels yet
    train._describe(training)
    seen = []
    for step, val_miou in ((1, 0.3), (2, 0.5), (3, 0.4), (4, 0.6)):
        _checkpoint(training, step, val_miou)
        if step == 3:
            time.sleep(1.0)  # worse than the best: nothing to do
            continue
        _wait_for(lambda wanted=f"step-{step:08d}-": Path(resolve(str(root)) or "").name.startswith(wanted))
        seen.append(Path(resolve(str(root))))
    follower.join(timeout=120)
    assert [each["step"] for each in results[0]["generations"]] == [1, 2, 4]
    assert sorted(path for path in root.iterdir() if path.name.startswith("step-")) == seen[1:]
    config.label.follow, config.label.checkpoint = False, "4"
    direct = Path(pseudo_label.work(config, LocalPool())["labels"])
    for tar in direct.glob("*.tar"):
        assert tar.read_bytes() == (seen[2] / tar.name).read_bytes()
        assert tar.read_bytes() != (seen[1] / tar.name).read_bytes()
    # Started again, it finds all done.
    config.label.follow, config.label.checkpoint = True, "best"
    assert pseudo_label.work(config, LocalPool())["generations"] == []


def test_what_an_export_needs_is_asked_for_before_anything_is_labelled(config, tmp_path):
    config = copy.deepcopy(config)
    config.label.output, config.label.coco, config.label.png = str(tmp_path / "labels"), True, True
    config.data.source = "coco"
    with pytest.raises(ValueError, match=r"label.coco=true with data.source=coco needs data.annotations"):
        pseudo_label.work(config, LocalPool())
    names = build.class_set(config).names
    categories = [{"id": 2 * number, "name": name} for number, name in enumerate(names, start=1)]
    document = {"images": [{"id": 5, "file_name": "other.jpg"}], "annotations": [], "categories": categories}
    (tmp_path / "val.json").write_text(json.dumps(document))
    config.data.annotations = str(tmp_path / "val.json")
    with pytest.raises(ValueError, match=r"data.annotations .*val.json does not list 6 of the 6 images"):
        pseudo_label.work(config, LocalPool())
    config.data.source, config.data.annotations = "voc", ""
    (tmp_path / "labels_png").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot be exported to .*labels_png"):
        pseudo_label.work(config, LocalPool())
    assert not list((tmp_path / "labels").glob("*"))


def _wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_followers_of_one_training_keep_their_models_apart(config):
    places = []
    for split, output in (("train", ""), ("val", ""), ("train", "elsewhere"), ("train", "s3://bucket/labels")):
        config = copy.deepcopy(config)
        config.label.split, config.label.output = split, output
        plan = build.follow_plan(config)
        places.append((plan.root, plan.snapshots))
    roots, snapshots = zip(*places, strict=True)
    assert len(set(roots)) == len(set(snapshots)) == 4
    config.label.checkpoint = "40"
    with pytest.raises(ValueError, match=r"follows label.checkpoint=best or latest, not '40'"):
        build.follow_plan(config)


def test_other_settings_have_a_name_of_their_own_and_a_test_set_becomes_an_archive(config):
    """Square input, the largest logit and two more CRFs; the validation scenes serve as a test set."""
    run, config = Path(config.run), copy.deepcopy(config)
    config.evaluate.parts, config.evaluate.name = ["val", "test"], "square-max"
    config.evaluate.input, config.evaluate.input_size, config.evaluate.merge = "square", 64, "max"
    config.evaluate.crf_presets, config.shards.test = ["wide", "deeplab"], config.shards.val
    result = evaluate.work(config, LocalPool())
    assert json.loads((run / "evaluate/square-max.json").read_text()) == result
    folder = run / "evaluate/square-max"
    assert result["val_miou"] == pytest.approx(_expected_miou(folder / "val", config.shards.val), abs=0.006)
    assert result["val_miou_deeplab"] == result["val_miou"]  # the same preset twice
    assert {"val_miou_wide", "val_miou_no_crf", "test_images"} <= result.keys() and result["test_images"] == 4
    with tarfile.open(result["submission"]) as tar:
        assert all(name.startswith("results/VOC2012/Segmentation/comp6_test_cls/") for name in tar.getnames())
        pictures = {Path(each.name).stem: tar.extractfile(each).read() for each in tar}
    kept = {one.key: one.image for path in (folder / "val").glob("*.tar") for one in read_shard(str(path))}
    assert pictures == kept

    segmenter = build.trained_segmenter(config, torch.device("cpu"))
    expected = MulticlassConfusionMatrix(NUM_CLASSES, ignore_index=255)
    for shard in build.index(config, "val").shards:
        for one in read_shard(f"{config.shards.val}/{shard.name}"):
            image = torch.from_numpy(np.array(Image.open(io.BytesIO(one.image)))).permute(2, 0, 1)[None] / 255
            square = torch.nn.functional.interpolate(image, (64, 64), mode="bilinear", antialias=True)
            features = [segmenter.encode(each) for each in (square, square.flip(3))]
            views = [segmenter.student.segment(each.tokens_BLND, each.grid) for each in features]
            views = [
                torch.nn.functional.interpolate(each, image.shape[2:], mode="bilinear").detach()
                for each in (views[0], views[1].flip(3))
            ]
            truth = torch.from_numpy(np.array(Image.open(io.BytesIO(one.mask))).astype(np.int64))
            expected.update(torch.maximum(*views).argmax(1)[0], truth)
    miou = mean_iou(expected.compute())
    # Rounding of batched against single products may move a pixel between two classes.
    assert result["val_miou_no_crf"] == pytest.approx(miou, abs=0.05)


def test_an_evaluation_at_all_scales_that_lost_a_part_does_that_part_again_to_the_same_bytes(tmp_path):
    """The published protocol (three scales, mirrored, CRF) on random weights, in shards of two scenes."""
    config = _small_run(tmp_path, per_shard=2)
    config.evaluate.parts, config.evaluate.name, config.evaluate.scales = ["val"], "published", [1.0, 1.2, 1.5]
    first = evaluate.work(config, LocalPool())
    folder = Path(config.run) / "evaluate/published/val"
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("shard-*")}
    assert len(before) == 4
    for lost in (folder / "shard-000001.tar", folder / "index.json"):
        lost.unlink()  # as a kill between two shards leaves it
    again = evaluate.work(config, LocalPool())
    assert {path: path.read_bytes() for path in folder.glob("shard-*")} == {
        path: data for path, (data, _) in before.items()
    }
    kept = folder / "shard-000000.tar"
    assert kept.stat().st_mtime_ns == before[kept][1]
    assert {key: value for key, value in again.items() if key != "seconds"} == {
        key: value for key, value in first.items() if key != "seconds"
    }


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "../elsewhere", r"evaluate\.name is '\.\./elsewhere'"),
        ("crf_presets", ["deeplap"], r"evaluate\.crf_presets is \['deeplap'\], allowed are deeplab, smooth, wide"),
        ("parts", ["test"], r"shards\.test is empty"),
    ],
)
def test_bad_evaluations_are_refused_before_anything_is_labelled(config, field, value, message):
    config = copy.deepcopy(config)
    setattr(config.evaluate, field, value)
    with pytest.raises(ValueError, match=message):
        evaluate.work(config, LocalPool())


def test_shards_without_masks_and_unknown_parts_are_refused(config):
    config.evaluate.parts = ["sead"]
    try:
        with pytest.raises(ValueError, match=r"evaluate\.parts is \['sead'\]"):
            evaluate.work(config, LocalPool())
    finally:
        config.evaluate.parts = ["seed", "mask", "val"]
