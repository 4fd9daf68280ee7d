"""Readers of data sets on disk; what they reject and why."""

import contextlib
import io
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dfa.data.labels import labels_in_mask
from dfa.data.sources import (
    ClassSet,
    CocoSource,
    FolderSource,
    MaskFile,
    MaskSegments,
    Reject,
    Sample,
    VocSource,
    mask_array,
    sample_key,
)

CONF = Path(__file__).parents[2] / "conf"
CLASSES = ClassSet.from_mapping(
    {
        "names": ["cat", "dog", "hot dog"],
        "background": ["sky"],
        "templates": ["a {}."],
        "prompts": {"cat": ["cat", "kitty"]},
    }
)


def conf_classes(name):
    return ClassSet.from_mapping(yaml.safe_load((CONF / f"classes_{name}.yaml").read_text()))


def save_image(path, size=(20, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).save(path)


def annotation(*names, difficult=()):
    objects = "".join(
        f"<object><name>{name}</name><difficult>{int(name in difficult)}</difficult>"
        "<part><name>head</name></part></object>"
        for name in names
    )
    return f"<annotation>{objects}</annotation>"


@pytest.fixture
def voc(tmp_path):
    """A VOC folder of three images; returns the folder with JPEGImages."""
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("a", "b", "c"):
        save_image(folder / "JPEGImages" / f"{name}.jpg")
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("c\na\nb\n")
    (folder / "Annotations").mkdir()
    (folder / "Annotations" / "a.xml").write_text(annotation("dog", "cat", "dog"))
    (folder / "Annotations" / "b.xml").write_text(annotation("hot dog", "cat", difficult=("cat",)))
    (folder / "Annotations" / "c.xml").write_text(annotation("cat"))
    return folder


# Class lists


def test_the_class_lists_are_those_of_the_field():
    voc, coco = conf_classes("voc"), conf_classes("coco")
    assert (len(voc.names), len(voc.background), len(coco.names), len(coco.background)) == (20, 25, 80, 23)
    assert voc.names == tuple(sorted(voc.names)) and voc.index("tvmonitor") == 20
    assert coco.index("toothbrush") == 80 and coco.index("stop sign") == 12
    assert set(voc.background) - set(coco.background) == {"keyboard", "sign"}
    assert voc.prompts[14] == ("person with clothes,people,human",)
    assert voc.prompts[0] == ("aeroplane",)
    assert coco.prompts[coco.index("hair drier") - 1] == ("hairdrier,blowdrier",)
    assert voc.templates == coco.templates == ("a clean origami {}.",)


def test_an_unknown_class_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown class 'aroplane'; nearest known: 'aeroplane'"):
        conf_classes("voc").index("aroplane")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["cat", "Cat"]}, "lists 'Cat' twice"),
        ({"names": ["background", "cat"]}, "foreground classes only"),
        ({"names": []}, "1 to 254 names, got 0"),
        ({"background": ["cat"]}, r"'cat' \(class 'cat'\).*'cat' are class texts and background prompts"),
        ({"background": ["Cat "]}, r"'cat' \(class 'cat'\).*'Cat ' are class texts and background prompts"),
        ({"prompts": {"dog": ["puppy", "CAT"]}}, r"'CAT' stands for the classes 'cat' and 'dog'"),
        ({"templates": ["a photo"]}, "exactly one {}"),
        ({"prompts": {"cta": ["x"]}}, "class 'cta'; nearest in names: 'cat'"),
        ({"prompts": {"cat": []}}, "class 'cat' has no prompt"),
        ({"promts": {}}, "key 'promts'.*nearest: 'prompts'"),
    ],
)
def test_a_broken_class_list_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        ClassSet.from_mapping({"names": ["cat", "dog"], "templates": ["a {}."], **change})


def test_the_palette_is_pascal_voc():
    palette = CLASSES.palette()
    for index in range(256):  # the devkit's bit loop
        color, rest = [0, 0, 0], index
        for shift in range(7, -1, -1):
            for channel in range(3):
                color[channel] |= ((rest >> channel) & 1) << shift
            rest >>= 3
        assert palette[index].tolist() == color
    assert palette[15].tolist() == [192, 128, 128] and palette[255].tolist() == [224, 224, 192]


# VOC


@pytest.mark.parametrize("up", [0, 1, 2])
def test_voc_is_found_from_each_parent_and_keeps_the_split_order(voc, up):
    root = [voc, voc.parent, voc.parent.parent][up]
    samples = list(VocSource(str(root), "train", CLASSES))
    assert [(s.key, s.labels, s.mask) for s in samples] == [("c", (1,), None), ("a", (1, 2), None), ("b", (1, 3), None)]


def test_sources_travel_to_other_processes(voc):
    source = VocSource(str(voc), "train", CLASSES)
    assert list(pickle.loads(pickle.dumps(source))) == list(source)


def test_difficult_objects_can_be_left_out(voc):
    samples = list(VocSource(str(voc), "train", CLASSES, keep_difficult=False))
    assert [s.labels for s in samples] == [(1,), (1, 2), (3,)]


def test_bad_annotations_reject_their_image_with_a_reason(voc):
    (voc / "Annotations" / "a.xml").write_text(annotation("dgo"))
    (voc / "Annotations" / "b.xml").write_text("<annotation><object>")
    (voc / "Annotations" / "c.xml").write_text(annotation())
    rejects = {r.key: r.reason for r in VocSource(str(voc), "train", CLASSES)}
    assert "unknown class 'dgo'; nearest known: 'dog'" in rejects["a"] and "a.xml" in rejects["a"]
    assert "not valid XML" in rejects["b"]
    assert rejects["c"].startswith("no image-level label")


def test_xml_entities_are_never_expanded(voc):
    bomb = '<!DOCTYPE a [<!ENTITY x "cat">]><annotation><object><name>&x;</name></object></annotation>'
    (voc / "Annotations" / "a.xml").write_text(bomb)
    rejects = {r.key: r.reason for r in VocSource(str(voc), "train", CLASSES) if isinstance(r, Reject)}
    assert "document type" in rejects["a"]


def test_unlabelled_images_can_be_kept_as_all_background_but_unknown_classes_cannot(voc):
    (voc / "Annotations" / "a.xml").write_text(annotation())
    (voc / "Annotations" / "b.xml").write_text(annotation("dgo"))
    (voc / "Annotations" / "c.xml").unlink()
    kinds = {s.key: s for s in VocSource(str(voc), "train", CLASSES, keep_unlabelled=True)}
    assert kinds["a"].labels == () and kinds["c"].labels == () and isinstance(kinds["b"], Reject)


def test_an_image_of_the_split_that_is_not_there_is_rejected(voc):
    (voc / "JPEGImages" / "b.jpg").unlink()
    rejects = [s for s in VocSource(str(voc), "train", CLASSES) if isinstance(s, Reject)]
    assert [(r.key, r.reason) for r in rejects] == [("b", "listed in split 'train' but not there")]


def test_a_label_file_replaces_annotations_and_names_line_and_nearest_class(voc, tmp_path):
    file = tmp_path / "labels.txt"
    file.write_text("# id classes\na dog\n\nb cta\n")
    got = {s.key: s for s in VocSource(str(voc), "train", CLASSES, label_file=str(file))}
    assert got["a"].labels == (2,)
    assert got["b"].reason == f"unknown class 'cta'; nearest known: 'cat' ({file} line 4)"
    assert got["c"].reason == "no image-level label"


@pytest.mark.parametrize(("kind", "line"), [("index_from_0", "a 0 2\nb 3\n"), ("index_from_1", "a 1 3\nb 0\n")])
def test_label_files_of_indices_say_where_they_start(voc, tmp_path, kind, line):
    file = tmp_path / "labels.txt"
    file.write_text(line)
    got = {s.key: s for s in VocSource(str(voc), "train", CLASSES, label_file=str(file), label_kind=kind)}
    assert got["a"].labels == (1, 3)
    assert "is outside" in got["b"].reason
    with pytest.raises(ValueError, match=r"label_kind is 'index'; allowed"):
        VocSource(str(voc), "train", CLASSES, label_kind="index")


def test_an_image_twice_in_a_label_file_is_an_error(voc, tmp_path):
    file = tmp_path / "labels.txt"
    file.write_text("a dog\nb cat\na.jpg cat\n")
    with pytest.raises(ValueError, match=r"lists 'a' twice, in lines 1 and 3"):
        list(VocSource(str(voc), "train", CLASSES, label_file=str(file)))


def test_masks_are_read_for_labels_only_when_asked_for_by_name(voc):
    masks = voc / "SegmentationClass"
    masks.mkdir()
    for name in ("a", "b", "c"):
        values = np.zeros((10, 20), np.uint8)
        values[:2], values[5] = (3 if name == "a" else 0), 255
        Image.fromarray(values).save(masks / f"{name}.png")
    weak = list(VocSource(str(voc), "train", CLASSES, masks="SegmentationClass"))
    assert [s.labels for s in weak] == [(1,), (1, 2), (1, 3)]
    assert weak[1].mask == MaskFile(str(masks / "a.png"))
    asked = {s.key: s for s in VocSource(str(voc), "train", CLASSES, masks="SegmentationClass", labels="masks")}
    assert asked["a"].labels == (3,) and "mask has no foreground" in asked["b"].reason
    for path in (voc / "Annotations").iterdir():
        path.unlink()
    (voc / "Annotations").rmdir()
    with pytest.raises(ValueError, match=r"no Annotations and no label_file.*labels='masks' by name"):
        list(VocSource(str(voc), "train", CLASSES, masks="SegmentationClass"))


def test_a_missing_mask_matters_only_when_masks_are_wanted(voc):
    (voc / "SegmentationClass").mkdir()
    assert all(isinstance(s, Sample) for s in VocSource(str(voc), "train", CLASSES))
    rejects = list(VocSource(str(voc), "train", CLASSES, masks="SegmentationClass"))
    assert all(isinstance(s, Reject) and "is missing" in s.reason for s in rejects)
    with pytest.raises(ValueError, match="SegmentationClassAug"):
        list(VocSource(str(voc), "train", CLASSES, masks="SegmentationClassAug"))


def test_voc_folders_that_are_not_there_are_named(voc, tmp_path):
    with pytest.raises(ValueError, match=r"no VOC folder at .*nowhere"):
        list(VocSource(str(tmp_path / "nowhere"), "train", CLASSES))
    with pytest.raises(ValueError, match=r"no split 'trian'.*known: \['train'\].*nearest: 'train'"):
        list(VocSource(str(voc), "trian", CLASSES))
    for path in (voc / "JPEGImages").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"holds no image \(looked for .jpg, .jpeg, .png\)"):
        list(VocSource(str(voc), "train", CLASSES))


# Masks


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (4, 4), (128, 0, 0)), "mode RGB, not class indices"),
        (Image.new("L", (4, 4), 90), r"values \[90\]; allowed are 0..3 and 255 \(COCO"),
        (Image.new("L", (4, 4), 200), r"values \[200\]; allowed are 0..3 and 255$"),
    ],
)
def test_masks_that_are_no_class_indices_are_named(tmp_path, image, message):
    image.save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=message) as error:
        mask_array(Sample("m", "", (1,), MaskFile(str(tmp_path / "m.png"))), num_classes=3)
    assert str(tmp_path / "m.png") in str(error.value)


# COCO


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


def test_a_coco_file_of_other_classes_is_an_error(coco):
    source = coco([])
    document = coco_document([], categories=((1, "cat"), (2, "hot dog"), (3, "dog")))
    Path(source.annotations).write_text(json.dumps(document))
    with pytest.raises(ValueError, match="category id 2 is 'hot dog', class 2 of the list is 'dog'"):
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


# Folders


def test_an_empty_folder_is_an_error_that_names_folder_and_extensions(tmp_path):
    with pytest.raises(ValueError, match=rf"no image in {tmp_path} \(looked for .jpg, .jpeg, .png"):
        list(FolderSource(str(tmp_path), CLASSES))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_tables_of_labels(tmp_path, kind):
    for name in ("x/1.jpg", "x/2.png", "3.JPG", "4.jpg", "5.jpg"):
        save_image(tmp_path / "data" / name)
    rows = [
        ("x/1.jpg", "cat;hot dog"),
        ("x/2", "dog"),
        ("./3.JPG", "dgo"),
        ("x/1.jpg", "dog"),
        ("4.jpg", ""),
        ("gone.jpg", "cat"),
    ]
    table = tmp_path / f"labels.{kind}"
    if kind == "jsonl":
        lines = [json.dumps({"image": image, "labels": label.split(";") if label else []}) for image, label in rows]
    else:
        lines = [("," if kind == "csv" else "\t").join(row) for row in [("image", "labels"), *rows]]
    table.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    got = list(FolderSource(str(tmp_path / "data"), CLASSES, table=str(table)))
    assert [s.key for s in got] == ["3", "4", "5", "x_1", "x_2", "gone"]
    line = 3 if kind == "jsonl" else 4
    assert got[0].reason == f"unknown class 'dgo'; nearest known: 'dog' ({table} line {line})"
    assert got[1].reason.startswith("no image-level label") and got[2].reason == "no image-level label"
    assert got[3].labels == (1, 2, 3) and got[4].labels == (2,)
    assert got[5].reason == f"listed in {table} but not there"


def test_a_table_without_the_column_names_the_nearest(tmp_path):
    save_image(tmp_path / "1.jpg")
    (tmp_path / "t.csv").write_text("image,label\n1,cat\n")
    with pytest.raises(ValueError, match=r"t.csv line 2 has no column 'labels'.*nearest: 'label'"):
        list(FolderSource(str(tmp_path), CLASSES, table=str(tmp_path / "t.csv")))
    (tmp_path / "t.jsonl").write_text('{"image": "1", "labels": "cat"}\n{oops\n')
    with pytest.raises(ValueError, match=r"t.jsonl line 2 is not valid JSON"):
        list(FolderSource(str(tmp_path), CLASSES, table=str(tmp_path / "t.jsonl")))


def test_one_folder_per_class_with_masks_inside_the_root(tmp_path):
    for name in ("cat/1.jpg", "hot dog/1.jpg", "dgo/1.jpg"):
        save_image(tmp_path / name)
    for name in ("cat", "hot dog", "dgo"):
        save_image(tmp_path / "masks" / name / "1.png")
    got = list(FolderSource(str(tmp_path), CLASSES, masks="masks"))
    assert [s.key for s in got] == ["cat_1", "dgo_1", "hot_dog_1"]
    assert got[0].labels == (1,) and got[2].labels == (3,)
    assert got[1].reason == "unknown class folder 'dgo'; nearest known: 'dog'"
    assert got[0].mask == MaskFile(str(tmp_path / "masks" / "cat" / "1.png"))


def test_keys_are_safe_member_names():
    assert sample_key("dir/a b.c-1_2") == "dir_a_b_c-1_2"
    other_scripts = [sample_key(name) for name in ("猫", "狗", "Äpfel", "Apfel")]
    assert len(set(other_scripts)) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", key) for key in other_scripts)
    long = [sample_key("x" * 200 + end) for end in "ab"]
    assert long[0] != long[1] and max(map(len, long)) <= 80
    with pytest.raises(ValueError, match="empty name"):
        sample_key("")


# Real data


def test_real_voc_labels_agree_with_the_masks(sample_data):
    classes = conf_classes("voc")
    root, file = str(sample_data / "voc_mini"), str(sample_data / "voc_mini" / "image_labels.txt")
    for split, number in (("train", 45), ("train_aug", 248), ("val", 77)):
        source = VocSource(root, split, classes, label_file=file, masks="SegmentationClassAug")
        samples = list(source)
        assert len(samples) == number and all(isinstance(s, Sample) for s in samples)
        # Boxes name objects that the masks leave out (93 % are equal); a mask never shows an object without a box.
        painted = [labels_in_mask(mask_array(sample, num_classes=20)) for sample in samples]
        assert all(set(mask) <= set(sample.labels) for mask, sample in zip(painted, samples, strict=True))
        assert sum(m == s.labels for m, s in zip(painted, samples, strict=True)) > 0.85 * number
    with pytest.raises(ValueError, match="no Annotations"):
        list(VocSource(root, "train", classes))


def test_real_coco_masks_equal_those_of_pycocotools(sample_data):
    from pycocotools.coco import COCO

    classes, root = conf_classes("coco"), sample_data / "coco_mini"
    path = str(root / "annotations" / "instances_train2014.json")
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO(path)
    ids = {identity: index for index, identity in enumerate(sorted(api.getCatIds()), start=1)}
    by_file = {image["file_name"]: image["id"] for image in api.dataset["images"]}
    samples = [s for s in CocoSource(str(root / "train2014"), path, classes, masks=True) if isinstance(s, Sample)]
    assert len(samples) > 30
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
