"""The jobs as users run them, on the world and on real photographs."""

import html
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from dfa import config
from dfa.data.shards import read_shard
from jobs import demo, evaluate, pseudo_label, report, shard, train
from tests.scores import miou_of_files

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
    "label.scorers=1",
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


def check(results, folder, num_train, num_classes):
    """What the jobs say, against the files that they wrote: labels and predictions of the first three images of a split."""
    run, scores = folder / "run", results["evaluate"]
    assert results["shard_train"]["num_samples"] == num_train
    assert results["train"]["step"] == 2 and not results["train"]["interrupted"]
    assert results["pseudo_label"]["num_images"] == num_train
    masks = {"mask_miou": ("labels/train", "train"), "val_miou": ("predictions/val", "val")}
    for name, (made, split) in masks.items():
        expected = miou_of_files(run / f"{made}_first_3", folder / f"shards/{split}", num_classes + 1)
        assert scores[name] == pytest.approx(expected, abs=0.006), name  # rounded to two decimals
    assert [scores["seed_threshold"], scores["seed_miou"]] in scores["seed_curve"]
    assert scores["seed_miou"] == max(miou for _, miou in scores["seed_curve"])
    check_page(Path(results["report"]["report"]).read_text(encoding="utf-8"), scores, folder / "shards")


def check_page(page, scores, shards):
    """Each sample's five pictures, the curves, and the scores with one decimal."""
    keys = {
        title: [one.key for path in sorted((shards / split).glob("*.tar")) for one in read_shard(str(path))][:6]
        for title, split in (("held-out", "val"), ("training", "train"))
    }
    panels = ("image", "ground truth", "CAM", "pseudo-label", "prediction")
    pictures = [f"{title} {key}: {panel}" for title in keys for key in keys[title] for panel in panels]
    shown = [html.unescape(text) for text in re.findall(r'<img src="data:image/[^"]{100,}" alt="([^"]*)"', page)]
    assert shown[: len(pictures)] == pictures
    curves = shown[len(pictures) :]
    assert {"The parts of the loss over the steps.", "CAM seeds over the background threshold."} <= set(curves)
    assert len(shown) == page.count("<img")
    for name in ("val_miou", "mask_miou", "seed_miou"):
        assert f"<b>{scores[name]:.1f}</b>" in page, name


def agreement_of_files(labels):
    """Mean share of pixels on which the model's masks and the labels agree; these labels have no void."""
    shares = []
    for path in Path(labels).glob("*.tar"):
        with tarfile.open(path) as tar:
            pngs = {
                each.name: np.array(Image.open(io.BytesIO(tar.extractfile(each).read())))
                for each in tar
                if each.name.endswith("png")
            }
        keys = [name.removesuffix(".model.png") for name in pngs if name.endswith(".model.png")]
        shares += [(pngs[f"{key}.model.png"] == pngs[f"{key}.png"]).mean() for key in keys]
    return np.mean(shares)


def test_real_voc_photographs_go_through_every_job_at_320_pixels(sample_data, tmp_path, ray_session):
    root = sample_data / "voc_mini/VOCdevkit/VOC2012"
    ids = (root / "ImageSets/Segmentation/train_aug.txt").read_text().split()
    (tmp_path / "train.txt").write_text("\n".join(ids[:5]))
    (tmp_path / "val.txt").write_text("\n".join(ids[5:8]))
    data = [f"data.root={root}", f"data.label_file={sample_data}/voc_mini/image_labels.txt"]
    data += ["data.masks=SegmentationClassAug", "data.samples_per_shard=3"]
    splits = {split: [f"data.split={tmp_path}/{split}.txt"] for split in ("train", "val")}
    results = run_jobs("voc_dfa", tmp_path, [*data, "label.png=true", "label.compare_model=true"], splits)
    check(results, tmp_path, 5, 20)
    made = results["pseudo_label"]
    for path in Path(made["png_folder"]).iterdir():
        mask, photograph = Image.open(path), Image.open(root / f"JPEGImages/{path.stem}.jpg")
        assert (mask.mode, mask.size) == ("P", photograph.size)
    quality = json.loads((Path(made["quality"]).parent / "quality.json").read_text())
    assert quality["num_images"] == 5
    assert quality["agreement_model"] == pytest.approx(agreement_of_files(made["labels"]), abs=1e-6)
    page = Path(made["quality"]).read_text(encoding="utf-8")
    for row in quality["worst"]:
        assert len(re.findall(rf'<img src="data:image/[^"]{{100,}}" alt="{row["key"]}[^"]*: \w', page)) >= 3, row["key"]


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
    check(results, tmp_path, 4, 80)
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


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory, ray_session):
    """A demo from nothing: its folder, its configuration, and what it says."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    overrides = [*QUICK, f"run={folder}", "world.num_train=6", "world.num_val=4", "data.samples_per_shard=3"]
    return (
        folder,
        overrides,
        demo.work(config.load("demo", overrides), fresh=False, second_stage=False, supervised=False),
    )


def test_the_demo_runs_from_nothing_and_again_without_repeating_itself(demo_run):
    folder, overrides, first = demo_run
    wanted = {"seed_miou", "mask_miou", "val_miou", "second_stage_miou", "supervised_miou"}
    assert wanted | {"seconds", "peak_gb", "report"} <= first.keys()
    assert first["second_stage_miou"] is first["supervised_miou"] is None and first["peak_gb"] > 0
    masks = {"mask_miou": ("labels/train", "train"), "val_miou": ("predictions/val", "val")}
    for name, (made, split) in masks.items():
        expected = miou_of_files(folder / f"{made}_first_3", folder / "shards" / split, 11)
        assert first[name] == pytest.approx(expected, abs=0.006), name  # rounded to two decimals
    scores = json.loads((folder / "evaluate.json").read_text())
    check_page(Path(first["report"]).read_text(encoding="utf-8"), scores, folder / "shards")
    before = {
        path: path.stat().st_mtime_ns
        for name in ("metrics.jsonl", "*.tar", "model.safetensors")
        for path in folder.rglob(name)
    }
    again = demo.work(config.load("demo", overrides), fresh=False, second_stage=False, supervised=False)
    assert len(before) > 5 and {path: path.stat().st_mtime_ns for path in before} == before
    assert {k: again[k] for k in masks | {"seed_miou": 0}} == {k: first[k] for k in masks | {"seed_miou": 0}}


@pytest.mark.runs
def test_the_demo_continues_with_a_second_student_that_learns_from_the_labels_of_the_first(demo_run):
    folder, overrides, first = demo_run
    metrics = (folder / "metrics.jsonl").read_bytes()
    result = demo.work(config.load("demo", overrides), fresh=False, second_stage=True, supervised=False)
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    expected = miou_of_files(folder / "second_stage/predictions/val_first_3", folder / "shards/val", 11)
    assert result["second_stage_miou"] == pytest.approx(expected, abs=0.006)  # rounded to two decimals
    described = json.loads((folder / "second_stage/run.json").read_text())["config"]
    assert (described["loss"]["supervision"], described["shards"]["labels"]) == ("labels", first["labels"])
    assert f"<b>{result['second_stage_miou']:.1f}</b>" in Path(result["report"]).read_text(encoding="utf-8")


def test_a_folder_that_no_demo_made_is_never_deleted(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="was not made by the demo"):
        demo.work(config.load("demo", [f"run={tmp_path}"]), fresh=True, second_stage=False, supervised=False)
    assert (tmp_path / "precious.txt").exists()
