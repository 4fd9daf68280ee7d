"""The reader of COCO files; what it rejects and why."""

import contextlib
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from dfa.data.sources import (
    CocoSource,
    MaskSegments,
    Reject,
    Sample,
    mask_array,
)
from tests.data.toy_sources import CLASSES, conf_classes, save_image


def coco_document(annotations, categories=((7, "dog"), (2, "cat"), (90, "hot dog"))):
    return {
        "images": [
            {"id": 5, "file_name": "b.jpg", "width": 20, "height": 10},
            {"id": 3, "file_name": "a.jpg", "width": 20, "height": 10},
        ],
        "annotations": [{"iscrowd": 0, **a, "id": number} for number, a in enumerate(annotations)],
        "categories": [{"id": i, "name": n} for i, n in categories],
    }


def box(image_id, category_id, x0, y0, x1, y1, **more):
    polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
    return {"image_id": image_id, "category_id": category_id, "segmentation": [polygon], **more}


@pytest.fixture
def coco(tmp_path):
    """Write a COCO file; returns (make source, image folder)."""
    for name in ("a", "b"):
        save_image(tmp_path / "images" / f"{name}.jpg")

    def make(annotations, **options):
        file = tmp_path / "instances.json"
        file.write_text(json.dumps(coco_document(annotations)))
        return CocoSource(str(tmp_path / "images"), str(file), CLASSES, **options)

    return make


def test_coco_ids_become_contiguous_in_ascending_order(coco):
    samples = list(coco([box(3, 90, 0, 0, 5, 5), box(3, 2, 0, 0, 2, 2), box(5, 7, 0, 0, 5, 5)]))
    assert [(s.key, s.labels, s.mask) for s in samples] == [("a", (1, 3), None), ("b", (2,), None)]


def test_small_objects_are_painted_over_large_ones(coco):
    annotations = [box(3, 2, 4, 4, 8, 8), box(3, 7, 0, 0, 20, 10), box(5, 7, 0, 0, 4, 4)]
    sample = next(iter(coco(annotations, masks=True)))
    mask = mask_array(pickle.loads(pickle.dumps(sample)), num_classes=3)
    expected = np.full((10, 20), 2, np.uint8)
    expected[4:8, 4:8] = 1
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(("crowd", "value", "labels"), [("class", 1, (1, 2)), ("void", 255, (2,)), ("drop", 0, (2,))])
def test_crowd_regions_are_painted_as_configured_and_below_objects(coco, crowd, value, labels):
    run_lengths = {"size": [10, 20], "counts": [0, 100, 100]}  # the left half, column by column
    crowded = {"image_id": 3, "category_id": 2, "segmentation": run_lengths, "iscrowd": 1}
    sample = next(iter(coco([box(3, 7, 5, 0, 20, 10), crowded], masks=True, crowd=crowd)))
    mask = mask_array(sample, num_classes=3)
    assert sample.labels == labels
    assert (mask[:, :5] == value).all() and (mask[:, 5:] == 2).all()


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ({"size": [10, 21], "counts": [0, 210]}, "size"),
        ({"size": [10, 20], "counts": [0, 999]}, "sum to 999, the image has 200"),
        ([[1, 2, 3, 4]], "fewer than three points"),
        (None, "cannot be painted"),
    ],
)
def test_annotations_that_cannot_be_painted_reject_the_image_only(coco, segmentation, reason):
    broken = {"image_id": 3, "category_id": 2, "segmentation": segmentation}
    first, second = coco([broken, box(5, 7, 0, 0, 4, 4)], masks=True)
    assert isinstance(first, Reject) and reason in first.reason
    assert isinstance(second, Sample)


def test_coco_images_without_objects_or_with_unknown_categories_are_rejected(coco):
    first, second = coco([box(3, 8, 0, 0, 4, 4)])
    assert "category ids [8]" in first.reason and second.reason == "no image-level label"


def test_annotations_of_images_that_are_not_listed_are_counted(coco, caplog):
    list(coco([box(3, 2, 0, 0, 4, 4), box(77, 2, 0, 0, 4, 4), box(77, 2, 1, 1, 2, 2)]))
    assert "2 annotations are of image ids that it does not list, such as ['77']" in caplog.text


def test_a_coco_file_of_other_classes_is_an_error(coco):
    source = coco([])
    for categories, message in (
        (((1, "cat"), (2, "hotdog"), (3, "dog")), r"category 'hotdog' is not in the list \(nearest: 'hot dog'\).*auto"),
        (((1, "cat"), (2, "hot dog")), r"has 2 categories, the class list 3; no category is called 'dog'"),
        (((1, "cat"), (1, "hot dog"), (3, "dog")), "category id twice"),
        (((1, "cat"), (2, "cat"), (3, "dog")), "category name twice"),
    ):
        Path(source.annotations).write_text(json.dumps(coco_document([], categories=categories)))
        with pytest.raises(ValueError, match=message):
            list(source)
    Path(source.annotations).write_text("[]")
    with pytest.raises(ValueError, match="no COCO instances file"):
        list(source)


def test_coco_file_names_cannot_leave_the_folder(coco):
    source = coco([])
    document = coco_document([])
    document["images"][0]["file_name"] = "../secret.jpg"
    Path(source.annotations).write_text(json.dumps(document))
    assert "leaves the image folder" in next(iter(source)).reason


@pytest.mark.parametrize("split", ["train2014", "val2014"])
def test_real_coco_masks_equal_those_of_pycocotools(sample_data, split):
    from pycocotools.coco import COCO

    classes, root = conf_classes("coco"), sample_data / "coco_mini"
    path = str(root / "annotations" / f"instances_{split}.json")
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO(path)
    ids = {identity: index for index, identity in enumerate(sorted(api.getCatIds()), start=1)}
    by_file = {image["file_name"]: image["id"] for image in api.dataset["images"]}
    samples = [s for s in CocoSource(str(root / split), path, classes, masks=True) if isinstance(s, Sample)]
    assert len(samples) == len(api.dataset["images"]) >= 40
    for sample in samples:
        annotations = api.loadAnns(api.getAnnIds(by_file[Path(sample.image).name]))
        assert sample.labels == tuple(sorted({ids[a["category_id"]] for a in annotations}))
        regions = [(a["iscrowd"], api.annToMask(a), ids[a["category_id"]], a["id"]) for a in annotations]
        expected = np.zeros_like(regions[0][1])
        for _, region, index, _ in sorted(regions, key=lambda r: (-r[0], -int(r[1].sum()), r[3])):
            expected[region == 1] = index
        assert isinstance(sample.mask, MaskSegments)
        np.testing.assert_array_equal(mask_array(sample, num_classes=80), expected)


@pytest.mark.parametrize("split", ["train2014", "val2014"])
def test_real_coco_label_files_agree_with_the_annotations(sample_data, split):
    root, classes = sample_data / "coco_mini", conf_classes("coco")
    places = (str(root / split), str(root / "annotations" / f"instances_{split}.json"), classes)
    from_json = {s.key: s for s in CocoSource(*places)}
    label_file = str(root / f"{split}_image_labels.txt")
    from_file = {s.key: s for s in CocoSource(*places, label_file=label_file, label_kind="index_from_0")}
    # The file leaves out what is tiny; both must name the same classes otherwise, which a shift by one would not.
    pairs = [(from_file[key].labels, from_json[key].labels) for key in from_json if isinstance(from_json[key], Sample)]
    assert all(set(short) <= set(full) for short, full in pairs)
    assert sum(short == full for short, full in pairs) > 0.85 * len(pairs)
