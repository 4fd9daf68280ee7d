"""Real photographs through jobs/pseudo_label: every number of its result and of its quality against the files alone."""

import contextlib
import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from dfa import build
from dfa.config import class_set, load
from dfa.data.shards import read_shard
from dfa.label.work import LocalPool
from jobs import pseudo_label
from tests import seeds_by_hand
from tests.small_runs import untrained_checkpoint, write_shards

NUM_IMAGES = 8
THRESHOLDS = (0.1, 0.2, 0.4)


def _small(image: Image.Image, method=Image.Resampling.NEAREST) -> Image.Image:
    """A sixth of the size: affinities grow with the fourth power of it."""
    return image.resize((image.width // 6, image.height // 6), method)


def _classes(name, root):
    """A class list whose prompts are words of the tiny CLIP: what it has no words for is all the same to it, and of
    classes that tie everywhere chance decides which wins."""
    words = ("beetle", "board", "drum", "fish", "kite", "lantern", "pencil", "shell", "tent", "train")
    pairs = (f"{one} and {other}" for one, other in itertools.permutations(words, 2))
    names = class_set(name).names
    prompts = {each: [pair] for each, pair in zip(names, pairs, strict=False)}
    document = {
        "names": list(names),
        "prompts": prompts,
        "background": ["sky", "grass"],
        "templates": ["a photo of a {}"],
    }
    (root / "classes.yaml").write_text(json.dumps(document))
    return f"data.classes={root}/classes.yaml"


def _voc(sample_data, root):
    voc, small = sample_data / "voc_mini", root / "VOC2012"
    keys = (voc / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").read_text().split()[:NUM_IMAGES]
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
        (small / folder).mkdir(parents=True)
        for key in keys:
            image = Image.open(voc / "VOCdevkit/VOC2012" / folder / f"{key}.{suffix}")
            _small(image).save(small / folder / f"{key}.{suffix}")
    (small / "ImageSets/Segmentation").mkdir(parents=True)
    (small / "ImageSets/Segmentation/val.txt").write_text("\n".join(keys))
    found = ["data.source=voc", f"data.root={small}", "data.split=val", "data.labels=file"]
    return [
        *found,
        _classes("classes_voc", root),
        f"data.label_file={voc}/image_labels.txt",
        "data.masks=SegmentationClassAug",
    ]


def _coco(sample_data, root):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(sample_data / "coco_mini/annotations/instances_val2014.json"))
    images, annotations = [], []
    (root / "photos").mkdir()
    for image in coco.dataset["images"][:NUM_IMAGES]:
        small = _small(Image.open(sample_data / "coco_mini/val2014" / image["file_name"]).convert("RGB"))
        small.save(root / "photos" / image["file_name"])
        images.append(image | {"width": small.width, "height": small.height})
        for one in coco.imgToAnns[image["id"]]:
            mask = np.asarray(_small(Image.fromarray(coco.annToMask(one))))
            code = coco_mask.encode(np.asfortranarray(mask))
            annotations.append(one | {"segmentation": code | {"counts": code["counts"].decode()}})
    document = {"images": images, "annotations": annotations, "categories": coco.dataset["categories"]}
    (root / "instances.json").write_text(json.dumps(document))
    found = ["data.source=coco", f"data.root={root}/photos", "data.labels=annotations"]
    return [*found, _classes("classes_coco", root), f"data.annotations={root}/instances.json", "data.masks=annotations"]


@pytest.fixture(autouse=True)
def one_thread():
    """As the factory's scorers: sums of another order move maps that are nearly constant before they are stretched."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["voc", "coco"])
def labelled(request, sample_data, tmp_path_factory):
    """A configuration and the result of its labelling, by the tiny CLIP and an untrained student."""
    root = tmp_path_factory.mktemp(request.param)
    made = {"voc": _voc, "coco": _coco}[request.param](sample_data, root)
    overrides = [*made, f"run={root}/run", f"shards.train={root}/train"]
    overrides += ["label.png=true", "label.coco=true", "label.soft=true", "label.confidence=true", "label.worst=6"]
    overrides += ["label.compare_model=true", "decoder.width=32", "decoder.depth=1"]
    overrides += [f"evaluate.thresholds={list(THRESHOLDS)}"]
    # What tests/seeds_by_hand.py computes; the transport converges, so that another way to it gives the same.
    overrides += ["affinity.source=attention", "cam.generator=transport", "cam.form=propagate"]
    overrides += ["cam.columns=strongest", "cam.marginal=area", "cam.normalization=row"]
    overrides += ["cam.scale=20", "cam.iterations=10000", "cam.tolerance=1e-6"]
    overrides += [
        "label.scorers=1",
        "label.batch_size=1",
    ]  # as they are made again here: batched sums round differently, and ties flip
    overrides += ["label.min_confidence=0.7"] if request.param == "coco" else []
    config = load("demo", overrides)
    settings = {"shuffle": False, "samples_per_shard": 5, "max_pixels": 10**6, "max_reject_share": 0.5}
    write_shards(config, config.shards.train, **settings)
    untrained_checkpoint(config, step=7, val_miou=0.25)
    return config, pseudo_label.work(config, LocalPool())


def _grey(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)))


def _members(folder: str) -> dict[str, bytes]:
    found = {}
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def _whole_mask(members, key):
    """The mask before its void band: what the CRF found most probable."""
    mask_HW, classes = _grey(members[f"{key}.png"]), json.loads(members[f"{key}.json"])["classes"]
    soft = _grey(members[f"{key}.soft.png"]).reshape(len(classes), *mask_HW.shape)
    return np.where(mask_HW == 255, np.array(classes, np.uint8)[soft.argmax(0)], mask_HW)


def _seeds(config, raw):
    """Scores of the image's classes in float64, one image at a time: (rows, classes)."""
    segmenter = build.trained_segmenter(config, torch.device("cpu"))
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(raw.image)).convert("RGB"))).permute(2, 0, 1)
    return seeds_by_hand.seeds(config, segmenter, image, raw.labels), np.array(raw.labels)


def _seed_mask(scores, classes, threshold):
    return np.where(scores.max(0) > threshold, classes[scores.argmax(0)], 0)


def _miou(pairs, num_classes):
    confusion = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for truth, mask in pairs:
        seen = truth != 255
        np.add.at(confusion, (truth[seen].astype(int), mask[seen].astype(int)), 1)
    hit, occurs = np.diag(confusion), confusion.sum(1) > 0
    return 100 * float((hit / np.maximum(confusion.sum(0) + confusion.sum(1) - hit, 1))[occurs].mean())


def test_every_number_is_that_of_the_files(labelled):
    config, result = labelled
    quality = json.loads((Path(result["quality"]).parent / "quality.json").read_text())
    members, names = _members(result["labels"]), build.class_set(config).names
    raws = {raw.key: raw for tar in sorted(Path(config.shards.train).glob("*.tar")) for raw in read_shard(str(tar))}
    masks = {key: _grey(members[f"{key}.png"]) for key in raws}
    whole = {key: _whole_mask(members, key) for key in raws}
    seeds = {key: _seeds(config, raw) for key, raw in raws.items()}
    truths = {key: _grey(raw.mask) for key, raw in raws.items()}
    assert result["num_images"] == quality["num_images"] == len(raws) and result["num_rejects"] == 0
    assert result["step"] == 7 and "step 7" in quality["facts"]["checkpoint"]

    pixels = np.bincount(np.concatenate([mask.ravel() for mask in masks.values()]), minlength=256)
    total = pixels.sum()
    assert result["void_share"] == round(pixels[255] / total, 5) and quality["void_share"] == pixels[255] / total
    shares = {name: round(pixels[value] / total, 5) for value, name in enumerate(("background", *names))}
    assert result["pixel_share"] == shares and quality["background_share"] == pixels[0] / total

    near = {"abs": 0.1}  # percent; sums of another order let a pixel flip where two classes tie
    seed = {key: _seed_mask(*seeds[key], config.cam.threshold) for key in raws}
    for name, found in (("mask_miou", whole), ("argmax_miou", seed)):
        expected = _miou(((truths[key], found[key]) for key in raws), len(names))
        assert result[name] == pytest.approx(expected, **near), name
    sweep = [_miou(((truths[key], _seed_mask(*seeds[key], t)) for key in raws), len(names)) for t in THRESHOLDS]
    assert result["seed_miou"] == pytest.approx(max(sweep), **near)
    assert result["seed_threshold"] == THRESHOLDS[int(np.argmax(sweep))]

    model = {key: _grey(members[f"{key}.model.png"]) for key in raws}
    agreement = {
        "agreement_seed": (seed, whole),
        "agreement_model": (model, whole),
        "agreement_seed_model": (seed, model),
    }
    for name, (one, other) in agreement.items():
        expected = np.mean([(one[key] == other[key]).mean() for key in raws])
        assert quality[name] == pytest.approx(expected, abs=1e-3), name
    confidence = {key: _grey(members[f"{key}.confidence.png"]).mean() / 255 for key in raws}
    assert quality["confidence"] == pytest.approx(np.mean(list(confidence.values())), abs=0.5 / 255)
    for value, one in enumerate(quality["classes"], start=1):
        carriers = [key for key, raw in raws.items() if value in raw.labels]
        empty = [key for key in carriers if not (masks[key] == value).any()]
        assert (one["name"], one["num_images"], one["num_empty"]) == (names[value - 1], len(carriers), len(empty))
        assert one["pixel_share"] == pixels[value] / total
        if carriers:
            assert one["confidence"] == pytest.approx(np.mean([confidence[key] for key in carriers]), abs=0.5 / 255)
    assert len(quality["worst"]) == 6 and {row["key"] for row in quality["worst"]} <= raws.keys()


def test_exports_show_the_same_masks_to_other_tools(labelled):
    config, result = labelled
    members = _members(result["labels"])
    masks = {
        name.removesuffix(".png"): _grey(data)
        for name, data in members.items()
        if name.count(".") == 1 and name.endswith("png")
    }
    for key, mask in masks.items():
        np.testing.assert_array_equal(np.array(Image.open(f"{result['png_folder']}/{key}.png")), mask)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(result["coco"])
        original = COCO(config.data.annotations) if config.data.annotations else None
    names = build.class_set(config).names
    value_of = {
        each["id"]: 1 + names.index(each["name"]) for each in coco.dataset["categories"] if each["name"] in names
    }
    for image in coco.dataset["images"]:
        if original is not None:
            assert original.imgs[image["id"]]["file_name"] == image["file_name"]
        canvas = np.zeros((image["height"], image["width"]), np.uint8)
        for annotation in coco.imgToAnns[image["id"]]:
            canvas[coco.annToMask(annotation).astype(bool)] = value_of[annotation["category_id"]]
        mask = masks[Path(image["file_name"]).stem]
        np.testing.assert_array_equal(canvas, np.where(mask == 255, 0, mask))
    assert len(coco.dataset["images"]) == len(masks) == NUM_IMAGES
    if original is not None:
        assert {(each["id"], each["name"]) for each in coco.dataset["categories"]} == {
            (each["id"], each["name"]) for each in original.dataset["categories"]
        }
