"""What is said of VOC and COCO folders, whole and damaged."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from dfa.data.inspection import COCO_SOURCE, SBD_SOURCE, VOC_SOURCE, inspect
from tests.data.toy_sources import conf_classes

NAMES = [f"2007_{number:06d}" for number in range(6)]


def look(root, num_sampled=100):
    return inspect(str(root), voc=conf_classes("voc"), coco=conf_classes("coco"), num_sampled=num_sampled)


def problems(found):
    return [(each.state, each.what) for each in found.findings if each.needed and each.state in ("missing", "wrong")]


@pytest.fixture
def voc(tmp_path):
    """A small devkit where nothing is wrong: two images a list."""
    folder = tmp_path / "VOCdevkit/VOC2012"
    for name in ("JPEGImages", "Annotations", "ImageSets/Segmentation", "SegmentationClass", "SegmentationClassAug"):
        (folder / name).mkdir(parents=True)
    for number, name in enumerate(NAMES):
        Image.new("RGB", (20, 12), (9, 99, 199)).save(folder / f"JPEGImages/{name}.jpg")
        (folder / f"Annotations/{name}.xml").write_text("<annotation><object><name>cat</name></object></annotation>")
        mask = Image.fromarray(np.full((12, 20), (0, 8, 255)[number % 3], np.uint8))
        mask.save(folder / f"SegmentationClassAug/{name}.png")
        if number > 1:
            mask.save(folder / f"SegmentationClass/{name}.png")
    for split, names in (("train_aug", NAMES[:4]), ("train", NAMES[2:4]), ("val", NAMES[4:])):
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
    return folder


def test_a_whole_devkit_is_fine_and_the_next_commands_are_told(voc, tmp_path):
    found = look(tmp_path)
    assert found.kind == "voc" and problems(found) == []
    augmented, train, val = found.commands
    assert augmented[2:] == (
        "data.split=train_aug",
        "data.masks=SegmentationClassAug",
        "data.output=shards/voc_train_aug",
    )
    assert train[2] == "data.split=train" and train[-1] == "data.output=shards/voc_train"
    assert val[1:4] == (f"data.root={voc}", "data.split=val", "data.masks=SegmentationClass")


@pytest.mark.parametrize(
    ("damage", "state", "message", "source"),
    [
        (lambda f: (f / f"JPEGImages/{NAMES[4]}.jpg").unlink(), "wrong", f"split val: 1 of 2 listed images.*{NAMES[4]}", VOC_SOURCE),
        (lambda f: shutil.rmtree(f / "Annotations"), "missing", "no Annotations/.*labels.txt", VOC_SOURCE),
        (lambda f: (f / f"Annotations/{NAMES[0]}.xml").unlink(), "missing", "train_aug: 1 of 4 images have no labels", VOC_SOURCE),
        (lambda f: (f / "ImageSets/Segmentation/val.txt").unlink(), "missing", "no list .*val.txt", VOC_SOURCE),
        (lambda f: (f / "ImageSets/Segmentation/train_aug.txt").unlink(), "note", "no list .*train_aug.txt", SBD_SOURCE),
        (lambda f: shutil.rmtree(f / "SegmentationClassAug"), "note", "2 of 4 masks .*to score seeds and masks", SBD_SOURCE),
        (lambda f: [shutil.rmtree(each) for each in f.glob("SegmentationC*")], "missing", "split val: no masks", VOC_SOURCE),
        (lambda f: cut(f / f"JPEGImages/{NAMES[1]}.jpg"), "wrong", "train_aug: 1 of 4 images looked at do not decode", ""),
        (lambda f: spoil(f / f"SegmentationClass/{NAMES[4]}.png", "RGB"), "wrong", "1 of 2 masks looked at: mask has mode RGB", VOC_SOURCE),
        (lambda f: spoil(f / f"SegmentationClass/{NAMES[4]}.png", 90), "wrong", "values above 20, such as 90", VOC_SOURCE),
        (lambda f: spoil(f / f"SegmentationClass/{NAMES[4]}.png", 1, (9, 9)), "wrong", "another size than its image", VOC_SOURCE),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_said_with_its_source(voc, damage, state, message, source):
    damage(voc)
    found = look(voc)
    said = [each for each in found.findings if re.search(message, each.what)]
    assert [(each.state, each.source) for each in said] == [(state, source)], found.findings
    assert (found.num_problems > 0) == (state != "note")


def cut(path):
    path.write_bytes(path.read_bytes()[:-80])


def spoil(path, value, size=(20, 12)):
    Image.new("RGB" if value == "RGB" else "L", size, (128, 0, 0) if value == "RGB" else value).save(path)


def test_only_so_many_images_of_a_split_are_decoded(voc):
    cut(voc / f"JPEGImages/{NAMES[1]}.jpg")
    assert problems(look(voc, num_sampled=2)) == []  # the first and the last


def test_masks_that_are_wrong_are_not_in_the_command(voc):
    spoil(voc / f"SegmentationClass/{NAMES[4]}.png", "RGB")
    shutil.rmtree(voc / "SegmentationClassAug")
    assert not any(
        part.startswith("data.masks")
        for command in look(voc).commands
        if "data.split=val" in command
        for part in command
    )


@pytest.fixture
def coco(tmp_path):
    """One image with a zebra (id 24, class 23) in each split."""
    names = conf_classes("coco").names
    official = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    region = coco_mask.encode(np.asfortranarray(np.ones((12, 20), np.uint8)))
    for split in ("train2014", "val2014"):
        (tmp_path / split).mkdir()
        name = "a.jpg" if split == "train2014" else "b.jpg"
        Image.new("RGB", (20, 12)).save(tmp_path / split / name)
        document = {
            "images": [{"id": 1, "file_name": name, "width": 20, "height": 12}],
            "categories": [{"id": i, "name": n} for i, n in zip(official, names, strict=True)],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 24, "iscrowd": 0}
                | {"segmentation": {"size": [12, 20], "counts": region["counts"].decode()}}
            ],
        }
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(document))
    return tmp_path


def test_whole_coco_is_fine_and_the_next_commands_are_told(coco):
    found = look(coco)
    assert found.kind == "coco" and problems(found) == []
    train, val = found.commands
    assert train == (
        "coco_dfa",
        f"data.root={coco}/train2014",
        f"data.annotations={coco}/annotations/instances_train2014.json",
        "data.output=shards/coco_train",
    )
    assert "data.masks=annotations" in val


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (24, "original ids up to 90 instead of 1..80"),
        ("RGB", "mode RGB"),
        (150, "do not name, such as 150"),
        (23, None),
    ],
)
def test_masks_of_coco_with_91_ids_or_colours_are_told_and_not_needed(coco, value, message):
    (coco / "masks/train2014").mkdir(parents=True)
    spoil(coco / "masks/train2014/a.png", value)
    found = look(coco)
    said = [each for each in found.findings if "masks/train2014" in each.what]
    assert [each.state for each in said] == (["fine"] if message is None else ["wrong"])
    assert message is None or message in said[0].what
    assert "data.masks=annotations paints them" in said[0].what and problems(found) == []


def test_what_coco_lacks_is_said(coco):
    shutil.rmtree(coco / "val2014")
    file = coco / "annotations/instances_train2014.json"
    document = json.loads(file.read_text())
    document["images"].append({"id": 2, "file_name": "../b.jpg", "width": 20, "height": 12})
    file.write_text(json.dumps(document))
    assert problems(look(coco)) == [
        ("wrong", "images train2014: 1 of 2 listed images are not there (../b.jpg)"),
        ("missing", "no folder of images val2014"),
    ]
    document["categories"][0]["name"] = "human"
    file.write_text(json.dumps(document))
    assert "category 'human' is not in the list" in problems(look(coco))[0][1]
    file.unlink()
    missing = look(coco).findings[0]
    assert (missing.state, missing.what, missing.source) == (
        "missing",
        "no annotations/instances_train2014.json",
        COCO_SOURCE,
    )


def test_another_folder_says_what_is_looked_for(tmp_path):
    (tmp_path / "cats").mkdir()
    with pytest.raises(ValueError, match=r"neither VOC nor COCO.*it holds cats\. .*jobs\.shard own"):
        look(tmp_path)


def test_the_job_ends_with_1_where_something_is_missing(voc):
    def job():
        command = [sys.executable, "-m", "jobs.check", str(voc)]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=os.environ)

    good = job()
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["commands"][0].startswith(f"python -m jobs.shard voc_dfa data.root={voc} ")
    shutil.rmtree(voc / "Annotations")
    bad = job()
    assert bad.returncode == 1 and "missing no Annotations" in bad.stderr
    assert json.loads(bad.stdout)["num_problems"] == 1


def test_real_subsets_are_fine(sample_data):
    for name, num_commands in (("voc_mini", 3), ("coco_mini", 2)):
        found = look(sample_data / name, num_sampled=5)
        assert problems(found) == [] and len(found.commands) == num_commands
