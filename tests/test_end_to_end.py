"""The jobs as users run them, on the world and on real photographs."""

import json
from pathlib import Path

import pytest
from PIL import Image
from pycocotools.coco import COCO

from dfa import config
from jobs import demo, evaluate, pseudo_label, report, shard, train

QUICK = [
    "clip.model=conf/tiny_clip.json",
    "clip.checkpoint=dfa/world/tiny_clip.safetensors",
    "clip.similarity=value",
    "clip.attention_blocks=2",
    "train.use_gpu=false",
    "train.precision=fp32",
    "train.steps=2",
    "train.batch_size=2",
    "train.checkpoint_every=2",
    "train.validate_every=2",
    "train.validate_images=1",
    "decoder.width=32",
    "decoder.depth=1",
    "decoder.heads=4",
    "evaluate.scales=[0.5]",  # photographs are thousands of patches to the tiny CLIP, and maps of pairs millions
    "evaluate.cam_scales=[0.5]",
    "evaluate.flip=false",
    "evaluate.limit=3",
    "label.checkpoint=latest",
    "label.min_probability=0.2",  # two steps leave every class about as likely, and a CRF of 81 classes takes its time
]


def run_jobs(name, folder, data, splits):
    """shard both splits, train, label, evaluate and report; returns each job's result."""
    shards = {split: f"{folder}/shards/{split}" for split in ("train", "val")}
    common = [*QUICK, f"run={folder}/run", f"shards.train={shards['train']}", f"shards.val={shards['val']}"]
    results = {}
    for split, options in splits.items():
        loaded = config.load(name, [*common, *data, *options, f"data.output={shards[split]}"])
        results[f"shard_{split}"] = shard.work(loaded)
    loaded = config.load(name, [*common, *data])
    for job in (train, pseudo_label, evaluate, report):
        results[job.__name__.split(".")[-1]] = job.work(loaded)
    json.dumps(results)
    return results


def check(results, num_train):
    assert results["shard_train"]["num_samples"] == num_train
    assert results["train"]["step"] == 2 and not results["train"]["interrupted"]
    assert results["pseudo_label"]["num_images"] == num_train
    for score in ("seed_miou", "mask_miou", "val_miou"):
        assert 0 <= results["evaluate"][score] <= 100
    page = Path(results["report"]["report"]).read_text(encoding="utf-8")
    assert page.count("<img") >= 8


def test_real_voc_photographs_go_through_every_job_at_320_pixels(sample_data, tmp_path, ray_session):
    root = sample_data / "voc_mini/VOCdevkit/VOC2012"
    ids = (root / "ImageSets/Segmentation/train_aug.txt").read_text().split()
    (tmp_path / "train.txt").write_text("\n".join(ids[:5]))
    (tmp_path / "val.txt").write_text("\n".join(ids[5:8]))
    data = [f"data.root={root}", f"data.label_file={sample_data}/voc_mini/image_labels.txt"]
    data += ["data.masks=SegmentationClassAug", "data.samples_per_shard=3"]
    splits = {split: [f"data.split={tmp_path}/{split}.txt"] for split in ("train", "val")}
    results = run_jobs("voc_dfa", tmp_path, [*data, "label.png=true", "label.compare_model=true"], splits)
    check(results, 5)
    made = results["pseudo_label"]
    for path in Path(made["png_folder"]).iterdir():
        mask, photograph = Image.open(path), Image.open(root / f"JPEGImages/{path.stem}.jpg")
        assert (mask.mode, mask.size) == ("P", photograph.size)
    quality = json.loads((Path(made["quality"]).parent / "quality.json").read_text())
    assert quality["num_images"] == 5
    assert 0 <= quality["agreement_model"] <= 1
    assert Path(made["quality"]).read_text(encoding="utf-8").count("<img") >= 10


def test_real_coco_photographs_go_through_every_job_at_320_pixels(sample_data, tmp_path, ray_session):
    root, splits = sample_data / "coco_mini", {}
    for split in ("train", "val"):
        document = json.loads((root / f"annotations/instances_{split}2014.json").read_text())
        labelled = {annotation["image_id"] for annotation in document["annotations"]}
        document["images"] = [image for image in document["images"] if image["id"] in labelled][:4]
        kept = {image["id"] for image in document["images"]}
        document["annotations"] = [each for each in document["annotations"] if each["image_id"] in kept]
        annotations = tmp_path / f"{split}.json"
        annotations.write_text(json.dumps(document))
        splits[split] = [f"data.root={root}/{split}2014", f"data.annotations={annotations}"]
    data = ["data.masks=annotations", "data.samples_per_shard=2", f"data.annotations={tmp_path}/train.json"]
    results = run_jobs("coco_dfa", tmp_path, [*data, "label.coco=true"], splits)
    check(results, 4)
    made, original = COCO(results["pseudo_label"]["coco"]), COCO(str(tmp_path / "train.json"))
    assert {key: made.imgs[key]["file_name"] for key in made.imgs} == {
        key: original.imgs[key]["file_name"] for key in made.imgs
    }
    assert len(made.imgs) == 4
    assert {key: made.cats[key]["name"] for key in made.cats} == {
        key: original.cats[key]["name"] for key in original.cats
    }
    for annotation in made.anns.values():
        image = made.imgs[annotation["image_id"]]
        assert made.annToMask(annotation).shape == (image["height"], image["width"])


def test_the_demo_runs_from_nothing_and_again_without_repeating_itself(tmp_path, ray_session):
    overrides = [*QUICK, f"run={tmp_path}/demo", "world.num_train=6", "world.num_val=4", "data.samples_per_shard=3"]
    first = demo.work(config.load("demo", overrides), fresh=False, second_stage=True, supervised=False)
    wanted = {
        "seed_miou",
        "mask_miou",
        "val_miou",
        "second_stage_miou",
        "supervised_miou",
        "seconds",
        "peak_gb",
        "report",
    }
    assert wanted <= first.keys() and Path(first["report"]).exists() and first["peak_gb"] > 0
    assert 0 <= first["second_stage_miou"] <= 100
    metrics = (tmp_path / "demo/metrics.jsonl").read_bytes()
    again = demo.work(config.load("demo", overrides), fresh=False, second_stage=False, supervised=False)
    assert (tmp_path / "demo/metrics.jsonl").read_bytes() == metrics
    assert {k: again[k] for k in ("seed_miou", "mask_miou", "val_miou")} == {
        k: first[k] for k in ("seed_miou", "mask_miou", "val_miou")
    }


def test_a_folder_that_no_demo_made_is_never_deleted(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="was not made by the demo"):
        demo.work(config.load("demo", [f"run={tmp_path}"]), fresh=True, second_stage=False, supervised=False)
    assert (tmp_path / "precious.txt").exists()
