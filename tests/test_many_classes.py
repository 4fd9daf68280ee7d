"""More classes than 8 bits can tell apart: 16-bit masks from the user's files to the scores, void and class 255 beside each other."""

import dataclasses
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools import mask as coco_mask

from dfa import build, config
from dfa.core.metrics import confusion_matrix
from dfa.data.classes import ClassSet
from dfa.data.offline import OfflineLabels
from dfa.data.planning import plan_shards, write_plan
from dfa.data.reading import CropSettings, Reader
from dfa.data.samples import MaskFile, MaskSegments, Sample, Segment
from dfa.data.shards import read_samples, read_shard
from dfa.data.sources import CocoSource, mask_array
from dfa.data.stream import eval_batches, to_batch
from dfa.data.transforms import decode_mask
from dfa.data.writer import finish, write_shard
from dfa.label import output
from dfa.label.export import export_coco, export_pngs
from dfa.label.images import ShardFile
from dfa.label.scoring import ImageScores, LabelSettings, Tally, label_image
from dfa.label.work import Batch, finish_piece, score_batch
from dfa.report.figures import Example, class_colour, mask_overlay, present_legend
from dfa.train.checkpoint import CheckpointInfo, save_checkpoint
from dfa.train.objective import EngineState
from jobs import evaluate, pseudo_label, train
from tests.scores import miou_of_files

WORDS = ("beetle", "board", "drum", "fish", "kite", "lantern", "pencil")
NAMES = tuple(" ".join(words) for words in itertools.product(WORDS, repeat=3))[:300]
VOID = 65535
VALUES = np.array([0, 254, 255, 256, 300, VOID], np.uint16)  # one that 8 bits would take for void among them
SETTINGS = LabelSettings(300, None, 1.0, 0.0, (0.25, 0.5))


def masks():
    rng = np.random.default_rng(0)
    return {f"k{number}": np.kron(rng.choice(VALUES, (6, 8)), np.ones((8, 8), np.uint16)) for number in range(3)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    samples = []
    for key, mask in masks().items():
        Image.fromarray(mask).save(folder / f"{key}.png")
        Image.fromarray(np.dstack([mask % 251, mask % 241, mask // 256]).astype(np.uint8)).save(folder / f"{key}.jpg")
        labels = tuple(int(value) for value in np.unique(mask) if 0 < value < VOID)
        samples.append(Sample(key, str(folder / f"{key}.jpg"), labels, MaskFile(str(folder / f"{key}.png"))))
    root = str(folder / "shards")
    plan = plan_shards(samples, class_names=NAMES, seed=0, shuffle=False, samples_per_shard=3, max_pixels=10**6)
    write_plan(root, plan)
    write_shard(root, plan.items[0])
    return finish(root, plan, max_reject_share=0.0)


def test_a_16_bit_mask_reaches_training_as_it_is(shards):
    crop = CropSettings(64, (0.4, 0.5), 0.0, 10**6)  # smaller than the crop: padding too
    columns = next(Reader(shards.path("shard-000000.tar"), 0, 300, 1, crop, True).blocks(0, np.arange(3), dict))
    batch = to_batch(columns)
    assert batch.mask_BHW.dtype == torch.int32 and (batch.mask_BHW[~batch.valid_BHW] == VOID).all()
    for key, mask_HW, valid_HW in zip(batch.keys, batch.mask_BHW, batch.valid_BHW, strict=True):
        assert set(mask_HW[valid_HW].tolist()) == set(masks()[key].reshape(-1).tolist())
    whole = next(eval_batches(shards, rank=0, world=1, batch_size=3, max_pixels=10**6))
    for key, mask_HW in zip(whole.keys, whole.mask_BHW, strict=True):
        np.testing.assert_array_equal(mask_HW.numpy(), masks()[key])


def test_masks_of_the_wrong_width_are_named(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "narrow.png")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "wide.png")
    narrow, wide = (Sample("k", "", (), MaskFile(str(tmp_path / f"{name}.png"))) for name in ("narrow", "wide"))
    assert mask_array(narrow, num_classes=254).dtype == np.uint8
    assert mask_array(wide, num_classes=255).dtype == np.uint16
    with pytest.raises(ValueError, match=r"narrow.png has 8-bit values; masks of 255 classes have 16-bit .* 65535"):
        mask_array(narrow, num_classes=255)
    with pytest.raises(ValueError, match=r"wide.png has 16-bit values; masks of 254 classes have 8-bit .* 255"):
        mask_array(wide, num_classes=254)


def scores(images, labels):
    """Each class of an image wins some blocks, beside a constant background."""
    found = []
    for image, present in zip(images, labels, strict=True):
        rng = np.random.default_rng(int(image.sum()))
        blocks = rng.random((1 + len(present), 6, 8), dtype=np.float32)
        found.append(ImageScores(np.kron(blocks, np.ones((8, 8), np.float32)), (0, *present)))
    return found


@pytest.fixture(scope="module")
def labelled(shards, tmp_path_factory):
    """A finished folder of labels, made without Ray, and what was scored."""
    root, entry = str(tmp_path_factory.mktemp("labels") / "labels"), shards.shards[0]
    part = ShardFile(shards.path(entry.name), entry.sha256)
    batch = Batch(part, read_samples(shards), NAMES, SETTINGS, 10**6, 8)
    done = [finish_piece(piece) for piece in score_batch(batch, scores)]
    item = output.LabelItem(entry.name, entry.sha256, 3, "hash")
    Path(root).mkdir()
    records = [record for piece in done for record in piece.records]
    output.commit(root, item, SETTINGS, records, [], output.total_tally([p.tally for p in done], SETTINGS), {})
    return output.finish(root, [item], NAMES, shards.plan_hash, SETTINGS)


def test_label_files_hold_16_bit_classes_and_the_scores_are_those_of_a_loop(shards, labelled):
    rows = read_samples(shards)
    images = [
        torch.from_numpy(np.asarray(Image.open(io.BytesIO(raw.image))).copy()).permute(2, 0, 1) for raw in raws(shards)
    ]
    expected = torch.zeros(301, 301, dtype=torch.int64)
    swept = torch.zeros(301, 301, dtype=torch.int64)
    for raw, one in zip(raws(labelled), scores(images, [row.labels for row in rows]), strict=True):
        mask_HW, truth_HW = decode_mask(raw.image, max_pixels=10**6), masks()[raw.key]
        assert mask_HW.dtype == np.uint16 and Image.open(io.BytesIO(raw.image)).mode == "I;16"
        ids = np.array(one.class_ids)
        np.testing.assert_array_equal(mask_HW, ids[one.score_KHW.argmax(0)])
        for y, x in zip(*np.nonzero(truth_HW != VOID), strict=True):
            expected[int(truth_HW[y, x]), int(mask_HW[y, x])] += 1
            best = one.score_KHW[1:, y, x]
            swept[int(truth_HW[y, x]), ids[1 + best.argmax()] if best.max() > 0.5 else 0] += 1
    assert torch.equal(labelled.tally.mask_CC, expected) and torch.equal(labelled.tally.argmax_CC, expected)
    assert torch.equal(labelled.tally.sweep_TCC[1], swept)
    assert int(labelled.tally.pixels_C[255]) > 0 and labelled.tally.void_pixels == 0


def raws(folder):
    return list(read_shard(f"{folder.root}/shard-000000.tar"))


def test_less_certain_pixels_become_void_and_no_class(shards):
    settings = LabelSettings(300, None, 1.0, 0.4, ())
    image = np.zeros((1, 3, 3), np.uint8)
    one = ImageScores(np.array([[[0.1, 0.1, 0.5]], [[0.9, 0.9, 0.5]], [[0.0, 0.0, 0.5]]], np.float32), (0, 255, 256))
    labelled = label_image(image, one, None, settings)
    assert labelled.mask_HW.tolist() == [[255, 255, VOID]]
    assert (labelled.tally.void_pixels, int(labelled.tally.pixels_C[255])) == (1, 2)
    row = read_samples(shards)[0]
    assert output.judge(row, labelled.mask_HW, 0.5, labelled.agreement).void_share == pytest.approx(1 / 3, abs=1e-6)


def test_labels_of_many_classes_are_trained_on(shards, labelled):
    offline = OfflineLabels(labelled.root, NAMES, shards.plan_hash)
    crop = CropSettings(64, (1.0, 1.0), 0.0, 10**6)
    reader = Reader(shards.path("shard-000000.tar"), 0, 300, 1, crop, False, offline)
    batch = to_batch(next(reader.blocks(0, np.arange(3), dict)))
    assert batch.given_B.all() and not batch.rejected
    shown = set(batch.mask_BHW.unique().tolist())
    assert {0, 255, VOID} <= shown <= {int(value) for value in VALUES}


def small_model(folder):
    (folder / "classes.yaml").write_text(
        yaml.safe_dump({"names": list(NAMES), "background": ["sky"], "templates": ["a photo of a {}"]})
    )
    overrides = [
        f"data.classes={folder}/classes.yaml",
        "clip.checkpoint=random",
        "decoder.width=32",
        "decoder.depth=1",
    ]
    return [*overrides, "crop.size=48", "affinity.hidden=4", "pseudo.dilations=[1,2]", "decoder.dropout=0.0"]


def test_one_step_and_one_validation_with_300_classes(tmp_path, shards):
    overrides = small_model(tmp_path)
    batch = next(eval_batches(shards, rank=0, world=1, batch_size=3, max_pixels=10**6))
    step = build.train_step(config.load("demo", overrides), torch.device("cpu"))
    parts = {part.name: part for part in step(batch)}
    assert all(torch.isfinite(part.total) for part in parts.values())
    assert torch.equal(
        step.validate(batch),
        confusion_matrix(
            step.segmenter.logits(batch.image_B3HW, scales=(1.0,), flip=False).argmax(1),
            batch.mask_BHW,
            num_classes=301,
        ),
    )
    padded = dataclasses.replace(batch, valid_BHW=batch.valid_BHW.clone(), given_B=torch.ones(3, dtype=torch.bool))
    padded.valid_BHW[:, 40:] = False
    labels = build.train_step(config.load("demo", [*overrides, "loss.supervision=labels"]), torch.device("cpu"))
    assert (labels.labels(padded, lambda rows: torch.empty(0))[:, 40:] == VOID).all()
    supervised = build.train_step(config.load("demo", [*overrides, "loss.supervision=masks"]), torch.device("cpu"))
    counts = {part.name: int(part.count) for part in supervised(batch)}
    assert counts == {
        "segmentation_background": int((batch.mask_BHW == 0).sum()),
        "segmentation_foreground": int(((batch.mask_BHW != 0) & (batch.mask_BHW != VOID)).sum()),
    }


def test_exports_keep_class_255(labelled, tmp_path):
    assert export_pngs(labelled.root, str(tmp_path / "pngs")) == 3
    export_coco(labelled.root, str(tmp_path / "coco.json"))
    document = json.loads((tmp_path / "coco.json").read_text())
    assert 255 in {each["category_id"] for each in document["annotations"]}
    names = {each["id"]: each["file_name"].removesuffix(".jpg") for each in document["images"]}
    for each in document["annotations"]:
        mask_HW = np.asarray(Image.open(tmp_path / "pngs" / f"{names[each['image_id']]}.png"))
        np.testing.assert_array_equal(
            coco_mask.decode(each["segmentation"]).astype(bool), mask_HW == each["category_id"]
        )


def test_coco_annotations_of_many_categories_are_painted_with_16_bits(tmp_path):
    segment = coco_mask.encode(np.asfortranarray(np.eye(4, dtype=np.uint8)))
    sample = Sample("k", "", (255,), MaskSegments(4, 4, (Segment(255, segment["counts"]),)))
    np.testing.assert_array_equal(mask_array(sample, num_classes=300), 255 * np.eye(4, dtype=np.uint16))
    names = [f"thing {number}" for number in range(300)]
    classes = ClassSet(tuple(names), tuple((name,) for name in names), (), ("a {}",))
    document = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 4, "height": 4}],
        "categories": [{"id": 1000 + number, "name": name} for number, name in enumerate(names)],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1254, "iscrowd": 0, "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]]},
            {
                "id": 2,
                "image_id": 1,
                "category_id": 1256,
                "iscrowd": 1,
                "segmentation": {"size": [4, 4], "counts": [14, 2]},
            },
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(document))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    source = CocoSource(str(tmp_path), str(tmp_path / "instances.json"), classes, masks=True, crowd="void")
    (sample,) = source
    assert sample.labels == (255,)
    assert set(mask_array(sample, num_classes=300).reshape(-1).tolist()) == {0, 255, VOID}


def test_figures_tell_class_255_of_many_from_void():
    mask_HW = np.array([[0, 254, VOID]], np.uint16)
    picture = mask_overlay(np.zeros((1, 3, 3), np.uint8), mask_HW, opacity=1.0)
    assert picture.shape == (1, 3, 3)
    legend = present_legend(Example(np.zeros((1, 3, 3), np.uint8), pseudo_HW=mask_HW), NAMES)
    assert legend == ((NAMES[253], class_colour(254)), ("void", class_colour(VOID)))


def test_the_tally_of_a_thousand_classes_takes_the_room_of_what_an_image_shows():
    settings = LabelSettings(1000, None, 1.0, 0.0, tuple(number / 40 for number in range(1, 21)))
    truth_HW = np.array([[0, 255, 1000, VOID]], np.uint16)
    one = ImageScores(np.array([[[0.1] * 4], [[0.2, 0.3, 0.4, 0.9]]], np.float32), (0, 1000))
    tally = label_image(np.zeros((1, 4, 3), np.uint8), one, truth_HW, settings).tally
    total = Tally.zero(settings) + tally + tally
    assert total.sweep.shape == (20, 1001, 1001)
    assert total.sweep.value_E.tolist() == [2] * 60  # three pixels that count, under each threshold


def test_the_logits_of_a_batch_take_no_more_memory_than_those_of_coco(tmp_path, shards):
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump({"names": list(NAMES), "templates": ["a {}"]}))
    given = [f"data.classes={tmp_path}/classes.yaml", f"shards.val={shards.root}", f"shards.train={shards.root}"]
    settings = config.load("demo", [*given, f"run={tmp_path}/run", "label.batch_pixels=100000"])
    student = build.segmenter(settings, torch.device("cpu")).student
    weights = {f"student.{name}": value.contiguous() for name, value in student.state_dict().items()}
    info = CheckpointInfo(1, 0, 0, None, 0, 1.0, NAMES, build.model_description(settings))
    save_checkpoint(settings.run, EngineState(weights, {}, {}, 0, 1.0), {}, info)
    model, seeds = (
        build.model_pass(settings, "val", limit=0),
        build.seed_pass(settings, "train", with_crf=True, limit=0),
    )
    assert build.factory_plan(settings, [seeds, model]).batch_pixels == 100_000 * 81 // 301
    assert build.factory_plan(settings, [seeds]).batch_pixels == 100_000


@pytest.mark.runs
def test_a_run_on_ray_trains_labels_and_scores_300_classes(tmp_path, shards, ray_session):
    overrides = [*small_model(tmp_path), f"run={tmp_path}/run", f"shards.train={shards.root}"]
    overrides += [f"shards.val={shards.root}", "train.steps=2", "train.batch_size=2", "train.workers=2"]
    overrides += ["train.validate_every=2", "train.checkpoint_every=2", "label.min_probability=0.2"]
    loaded = config.load("demo", [*overrides, "evaluate.scales=[1.0]", "evaluate.cam_scales=[1.0]", "label.scorers=1"])
    result = train.work(loaded)
    assert (result["step"], result["samples_seen"], result["num_rejected"]) == (2, 4, 0)
    made = pseudo_label.work(loaded)
    assert made["num_images"] == 3
    for raw in read_shard(f"{loaded.run}/labels/train/shard-000000.tar"):
        assert set(np.unique(decode_mask(raw.image, max_pixels=10**6))) <= {*range(301), VOID}
        assert Image.open(io.BytesIO(raw.image)).mode == "I;16"
    measured = evaluate.work(loaded)
    for name, made in (("val_miou", "predictions/val"), ("mask_miou", "labels/train")):
        expected = miou_of_files(f"{loaded.run}/{made}", shards.root, 301, void=VOID)
        assert measured[name] == pytest.approx(expected, abs=0.006)  # rounded to two decimals
