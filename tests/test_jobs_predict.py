"""predict on a folder of pictures and on shards: the masks are those of `dfa.load(run).predict`."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dfa
from dfa import build
from dfa.config import load
from dfa.data.shards import read_shard
from dfa.label.crf import PRESETS
from dfa.label.work import LocalPool
from dfa.world.folder import write_voc
from jobs import predict
from tests.small_runs import untrained_checkpoint, write_shards

NUM_IMAGES, NUM_BROKEN = 9, 4
UNUSABLE = ("broken.jpg", "deep/gone.png", "deep/note.png", "deep_tiny.png")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """An untrained run, and a folder of pictures: scenes, a grey one, a tiny one, and two files that are none."""
    root = tmp_path_factory.mktemp("predict")
    small = [
        "decoder.width=32",
        "decoder.depth=1",
        "evaluate.scales=[1.0]",
        "data.samples_per_shard=4",
        "label.scorers=1",
    ]
    config = load("demo", [f"run={root}/run", f"predict.input={root}/photos", *small])
    student = build.segmenter(config, torch.device("cpu")).student
    with torch.no_grad():
        student.decoder.classify.weight *= 20
        student.decoder.classify.bias[5:] -= 40  # few classes: the CRF of each picture is short
    untrained_checkpoint(config, student)
    config.data.root = str(write_voc(root / "world", seed=1, num_train=4, num_val=2))
    _fill(root / "photos", sorted((root / "world").rglob("*.jpg")))
    return config


def _fill(folder, scenes):
    (folder / "deep/er").mkdir(parents=True)
    for number, scene in enumerate(scenes):
        (folder / ("deep/er" if number % 2 else "") / scene.name).write_bytes(scene.read_bytes())
    assert len(scenes) == NUM_IMAGES - 3
    Image.open(scenes[0]).convert("L").save(folder / "grey.png")
    Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3)).save(folder / "deep/tiny.png")
    Image.new("RGB", (200, 3), (9, 99, 199)).save(folder / "wide.jpg")
    (folder / "broken.jpg").write_bytes(scenes[0].read_bytes()[:1000])
    (folder / "deep/note.png").write_bytes(b"no picture")
    (folder / "deep/gone.png").symlink_to(folder / "nowhere")
    (folder / "deep_tiny.png").write_bytes((folder / "deep/tiny.png").read_bytes())  # the key of deep/tiny.png
    (folder / "new.webp").write_bytes(b"not read")


def _agreement(config, paths_and_masks):
    """Smallest share of equal pixels between masks and the library call."""
    model = dfa.load(config.run, scales=config.evaluate.scales, flip=config.evaluate.flip)
    shares = []
    for path, mask_HW in paths_and_masks:
        expected_HW = model.predict(path, crf=PRESETS["deeplab"] if config.predict.crf else None).mask
        assert mask_HW.shape == expected_HW.shape
        shares.append((mask_HW == expected_HW).mean())
    return min(shares)


def test_a_folder_of_pictures_gets_the_masks_of_the_model(config):
    result = predict.work(config, LocalPool())
    assert (result["num_images"], result["num_rejects"], result["predicted_now"]) == (
        NUM_IMAGES,
        NUM_BROKEN,
        NUM_IMAGES,
    )
    assert len(result["rejects"]) == NUM_BROKEN
    assert result["rejects"][0].startswith("broken: ")
    assert "not a JPEG or PNG" in result["rejects"][1]
    assert result["rejects"][2] == "deep/gone.png: cannot be read: No such file or directory"
    assert result["rejects"][3].startswith("deep_tiny.png: has the key of 'deep/tiny.png'")
    assert result["unread"] == {".webp": 1}
    assert sum(result["pixel_share"].values()) == pytest.approx(1, abs=1e-4)  # rounded
    assert result["output"] == f"{config.run}/predict/photos"
    assert json.loads(json.dumps(result)) == result

    photos, masks = Path(config.predict.input), Path(result["png_folder"])
    usable = {path.relative_to(photos) for path in photos.rglob("*.*")} - {
        Path(name) for name in (*UNUSABLE, "new.webp")
    }
    assert {path.relative_to(masks) for path in masks.rglob("*.*")} == {path.with_suffix(".png") for path in usable}
    # A batch rounds otherwise than an image alone: a pixel between two classes may go to the other.
    pairs = ((photos / path, np.array(Image.open(masks / path.with_suffix(".png")))) for path in usable)
    assert _agreement(config, pairs) > 0.995
    assert Image.open(masks / "grey.png").getpalette()[3:6] == [128, 0, 0]

    rows = list(csv.DictReader(Path(result["output"], "images.csv").read_text().splitlines()))
    assert {row["image"]: row["mask"] for row in rows} == {
        str(path): str(path.with_suffix(".png")) for path in usable
    } | dict.fromkeys(UNUSABLE, "")
    assert all(bool(row["mask"]) == (not row["reject"]) for row in rows)
    keys = {sample.key for tar in Path(result["output"]).glob("*.tar") for sample in read_shard(str(tar))}
    assert {row["key"] for row in rows if row["mask"]} == keys


def test_what_is_there_is_not_predicted_again(config):
    root = Path(predict.work(config, LocalPool())["output"])
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.glob("*.tar")}
    assert len(before) == 3
    (root / "shard-000001.json").unlink()
    again = predict.work(config, LocalPool())
    assert again["predicted_now"] == len(list(read_shard(str(root / "shard-000001.tar"))))
    paths = [each for folder in (root, Path(again["png_folder"])) for each in (folder, *folder.rglob("*"))]
    times = {path: path.stat().st_mtime_ns for path in paths}
    assert predict.work(config, LocalPool())["predicted_now"] == 0
    assert {path: path.stat().st_mtime_ns for path in paths} == times  # also of folders: no file came or went
    for path in root.glob("*.tar"):
        time_ns, data = before[path.name]
        assert path.read_bytes() == data
        assert (path.stat().st_mtime_ns == time_ns) == (path.name != "shard-000001.tar")
    # A picture that joins behind the others belongs to the last shard, which alone is done again.
    late = Path(config.predict.input) / "zz.png"
    Image.new("RGB", (30, 20), (9, 99, 199)).save(late)
    joined = predict.work(config, LocalPool())
    assert joined["num_images"] == NUM_IMAGES + 1
    assert joined["predicted_now"] == len(list(read_shard(str(root / "shard-000002.tar"))))
    assert Path(joined["png_folder"], "zz.png").exists()
    late.unlink()
    assert predict.work(config, LocalPool())["num_images"] == NUM_IMAGES
    assert not Path(joined["png_folder"], "zz.png").exists()


def test_another_folder_of_the_same_name_needs_an_output_of_its_own(config, tmp_path):
    root = Path(predict.work(config, LocalPool())["output"])
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (30, 20), (9, 99, 199)).save(tmp_path / "photos/a.png")
    other = replace(config, predict=replace(config.predict, input=f"{tmp_path}/photos"))
    before = sorted(root.iterdir())
    with pytest.raises(ValueError, match=f"holds the masks of {config.predict.input}, not of {tmp_path}/photos"):
        predict.work(other, LocalPool())
    assert sorted(root.iterdir()) == before


def test_shards_are_predicted_too(config, tmp_path):
    shards = tmp_path / "shards"
    write_shards(config, str(shards), samples_per_shard=3)
    kept = config.predict
    config.predict = type(kept)(input=str(shards), output=str(tmp_path / "masks"), crf=False, png=False)
    try:
        result = predict.work(config, LocalPool())
        assert (result["num_images"], result["png_folder"], result["output"]) == (4, None, str(tmp_path / "masks"))
        pictures = {path.stem: path for path in Path(config.data.root).rglob("*.jpg")}
        found = [one for path in sorted((tmp_path / "masks").glob("*.tar")) for one in read_shard(str(path))]
        (tmp_path / "png").mkdir()
        for one in found:
            (tmp_path / "png" / f"{one.key}.png").write_bytes(one.image)
        masks = ((pictures[one.key], np.array(Image.open(tmp_path / "png" / f"{one.key}.png"))) for one in found)
        assert _agreement(config, masks) > 0.995
        assert len(found) == 4
    finally:
        config.predict = kept


def test_inputs_that_cannot_be_predicted_are_refused(config, tmp_path):
    kept, config.predict = config.predict, type(config.predict)(input=str(tmp_path))
    try:
        with pytest.raises(ValueError, match="no image in"):
            predict.work(config, LocalPool())
        config.predict.input = ""
        with pytest.raises(ValueError, match=r"predict\.input is empty"):
            predict.work(config, LocalPool())
    finally:
        config.predict = kept
