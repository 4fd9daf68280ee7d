"""A published recipe by one command, on a devkit of a few small pictures."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import recipe

SETTINGS = [
    "clip.model=conf/tiny_clip.json",
    "clip.checkpoint=dfa/world/tiny_clip.safetensors",
    "clip.similarity=value",
    "clip.attention_blocks=2",
    "crop.size=48",
    "decoder.width=32",
    "decoder.depth=1",
    "decoder.heads=4",
    "data.samples_per_shard=3",
    "train.use_gpu=false",
    "train.precision=fp32",
    "train.steps=2",
    "train.batch_size=2",
    "train.checkpoint_every=2",
    "train.validate_images=1",
    "label.min_probability=0.2",
    "label.scorers=1",
    "evaluate.scales=[1.0]",
    "evaluate.cam_scales=[1.0]",
    "evaluate.flip=false",
]


@pytest.fixture
def devkit(tmp_path):
    """Seven pictures: four to train on, two of these with masks, three to validate."""
    folder, rng = tmp_path / "VOCdevkit/VOC2012", random.Random(0)
    for name in ("JPEGImages", "Annotations", "ImageSets/Segmentation", "SegmentationClass"):
        (folder / name).mkdir(parents=True)
    names = [f"2007_{number:06d}" for number in range(7)]
    for name in names:
        pixels = np.random.default_rng(rng.randrange(99)).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"JPEGImages/{name}.jpg")
        (folder / f"Annotations/{name}.xml").write_text("<annotation><object><name>cat</name></object></annotation>")
    mask_HW = np.zeros((48, 64), np.uint8)
    mask_HW[10:30, 10:40] = 8
    for name in names[2:]:
        Image.fromarray(mask_HW).save(folder / f"SegmentationClass/{name}.png")
    for split, listed in (("train_aug", names[:4]), ("train", names[2:4]), ("val", names[4:])):
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(listed))
    return folder


@pytest.mark.runs
def test_one_command_goes_from_the_folder_to_the_scores_and_again_repeats_nothing(devkit, tmp_path, ray_session):
    overrides = [*SETTINGS, f"run={tmp_path}/run", f"data.output={tmp_path}/shards"]
    first = recipe.work("voc_dfa", str(devkit), overrides)
    assert first["step"] == 2 and first["paper"] == {"seed_miou": 79.1, "mask_miou": 80.8, "val_miou": 79.3}
    sizes = {
        path.parent.name: json.loads(path.read_text())["num_samples"] for path in tmp_path.glob("shards/*/index.json")
    }
    assert sizes == {"voc_train_aug": 4, "voc_train": 2, "voc_val": 3}
    run = Path(first["run"])
    kept = {name: json.loads((run / f"evaluate/{name}.json").read_text()) for name in ("seed", "mask")}
    kept["val"] = json.loads((run / "evaluate.json").read_text())
    assert {name: first[f"{name}_miou"] for name in kept} == {name: kept[name][f"{name}_miou"] for name in kept}
    assert [
        kept[name][f"{split}_images"] for name, split in (("seed", "train"), ("mask", "train"), ("val", "val"))
    ] == [2, 2, 3]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    again = recipe.work("voc_dfa", str(tmp_path / "nothing is looked for there"), overrides)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")} == written


def test_what_is_wrong_is_told_before_anything_is_written(devkit, tmp_path):
    overrides = [*SETTINGS, f"run={tmp_path}/run", f"data.output={tmp_path}/shards"]
    with pytest.raises(ValueError, match=r"coco_dfa is a recipe of coco, .*VOC2012 holds voc"):
        recipe.work("coco_dfa", str(devkit), overrides)
    with pytest.raises(ValueError, match=r"own is no recipe of VOC or COCO: its data\.source is folder"):
        recipe.work("own", str(devkit), overrides)
    (devkit / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(ValueError, match="1 of the findings above must be mended first"):
        recipe.work("voc_dfa", str(devkit), overrides)
    assert not (tmp_path / "shards").exists()
