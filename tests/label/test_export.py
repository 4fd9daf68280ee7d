"""Finished labels as other tools read them: PIL, pycocotools, numpy."""

import contextlib
import gc
import io
import json
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO

from dfa.data import storage
from dfa.data.classes import ClassSet
from dfa.data.shards import BrokenShardError
from dfa.data.sources import CocoSource, Sample
from dfa.label.export import (
    OriginalIds,
    check_file,
    check_folder,
    check_listed,
    export_coco,
    export_pngs,
    read_original_ids,
)
from dfa.label.output import UnwritableError
from tests.label.folder import NAMES, Label, blocks, grey_png, indexed_anew, write_images, write_labels, write_tar

CONF = Path(__file__).parents[2] / "conf"
RANDOM = np.random.default_rng(0)


def random_mask(height, width, values=(0, 1, 2, 3, 255)):
    return RANDOM.choice(np.array(values, np.uint8), (height, width))


SHARDS = (
    (
        Label("b", random_mask(7, 5), (1, 2, 3), 0.25),
        Label("a", blocks(), (1, 2, 3), 1.0),
        Label("nothing", np.zeros((4, 6), np.uint8), (2,), 0.9),
    ),
    (),
    (Label("void", np.full((3, 2), 255, np.uint8), (1,), 0.1), Label("c_1", random_mask(1, 9), (1, 2, 3), 0.0)),
)
LABELS = {label.key: label for shard in SHARDS for label in shard}


@pytest.fixture
def root(tmp_path):
    return write_labels(tmp_path / "labels", SHARDS)


def load(path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def repaint(coco, image) -> np.ndarray:
    """The mask that the annotations say, 0 where there is none; two on one pixel fail."""
    canvas = np.zeros((image["height"], image["width"]), np.uint8)
    for annotation in coco.imgToAnns[image["id"]]:
        region = coco.annToMask(annotation).astype(bool)
        assert not canvas[region].any()
        canvas[region] = annotation["category_id"]
    return canvas


def test_pngs_are_the_masks_as_pil_reads_them(root, tmp_path):
    assert export_pngs(root, str(tmp_path / "deep" / "pngs")) == len(LABELS)
    files = sorted((tmp_path / "deep" / "pngs").iterdir())
    assert [file.name for file in files] == sorted(f"{key}.png" for key in LABELS)
    for file in files:
        picture = Image.open(file)
        assert picture.mode == "P" and picture.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
        np.testing.assert_array_equal(np.asarray(picture), LABELS[file.stem].mask_HW)


def test_pngs_that_are_there_are_not_written_again_and_damaged_ones_are(root, tmp_path):
    folder = tmp_path / "pngs"
    export_pngs(root, str(folder))
    (folder / "own.txt").write_text("mine")
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[:-3])
    (folder / "a.png").unlink()
    before = {file.name: file.stat().st_ino for file in folder.iterdir()}
    assert export_pngs(root, str(folder)) == len(LABELS)
    after = {file.name: file.stat().st_ino for file in folder.iterdir()}
    assert (folder / "b.png").read_bytes() == whole and (folder / "own.txt").read_text() == "mine"
    assert {name for name in after if after[name] != before.get(name)} == {"a.png", "b.png"}


def test_masks_that_the_labels_no_longer_have_are_deleted_and_foreign_pngs_are_not(tmp_path):
    def labels(*keys):
        root = tmp_path / "labels"
        for path in root.glob("shard-*") if root.exists() else ():
            path.unlink()
        noted = (root / "pngs.json").read_bytes() if root.exists() else None
        shutil.rmtree(root, ignore_errors=True)
        write_labels(root, [[Label(key, random_mask(4, 5), (1,), row=row) for row, key in enumerate(keys)]])
        if noted:
            (root / "pngs.json").write_bytes(noted)
        return str(root)

    folder = tmp_path / "pngs"
    export_pngs(labels("a", "b"), str(folder))
    (folder / "truth.png").write_bytes((folder / "a.png").read_bytes())
    export_pngs(labels("b", "c"), str(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["b.png", "c.png", "truth.png"]
    # Another folder has its own files, whatever they are called.
    (tmp_path / "other").mkdir()
    (tmp_path / "other/b.png").write_bytes(b"mine")
    export_pngs(labels("c"), str(tmp_path / "other"))
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["b.png", "c.png"]


def test_pngs_may_lie_in_subfolders_and_a_finished_export_writes_nothing(root, tmp_path):
    folder, names = tmp_path / "pngs", {"a": "trip/day 1/a.png", "b": "trip/b.png"}
    assert export_pngs(root, str(folder), names) == len(LABELS)
    made = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    assert made == {names.get(key, f"{key}.png") for key in LABELS}
    np.testing.assert_array_equal(np.asarray(Image.open(folder / names["a"])), LABELS["a"].mask_HW)

    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in [*tmp_path.rglob("*"), tmp_path]}

    before = state()
    export_pngs(root, str(folder), names)
    assert state() == before
    noted = json.loads(Path(root, "pngs.json").read_text())
    Path(root, "pngs.json").write_text(json.dumps({**noted, "names": ["../own.png"]}))
    with pytest.raises(ValueError, match=r"pngs\.json names '\.\./own\.png', which is not inside"):
        export_pngs(root, str(folder), names)


def test_coco_gives_back_every_mask_exactly(root, tmp_path):
    num_annotations = export_coco(root, str(tmp_path / "coco.json"))
    coco = load(tmp_path / "coco.json")
    assert [(image["id"], image["file_name"]) for image in coco.dataset["images"]] == [
        (number, f"{key}.jpg") for number, key in enumerate(LABELS, start=1)
    ]
    for image, label in zip(coco.dataset["images"], LABELS.values(), strict=True):
        np.testing.assert_array_equal(repaint(coco, image), np.where(label.mask_HW == 255, 0, label.mask_HW))
    assert num_annotations == len(coco.anns) == sum(len(set(np.unique(x.mask_HW)) - {0, 255}) for x in LABELS.values())
    assert [(entry["id"], entry["name"]) for entry in coco.dataset["categories"]] == [*enumerate(NAMES, start=1)]


def test_coco_areas_boxes_and_scores_are_those_of_the_pixels(root, tmp_path):
    export_coco(root, str(tmp_path / "coco.json"))
    coco = load(tmp_path / "coco.json")
    assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
    for annotation in coco.anns.values():
        label = LABELS[coco.imgs[annotation["image_id"]]["file_name"].removesuffix(".jpg")]
        y, x = np.nonzero(label.mask_HW == annotation["category_id"])
        assert annotation["area"] == len(y) and annotation["iscrowd"] == 0
        assert annotation["bbox"] == [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
        assert annotation["score"] == label.confidence


def test_coco_is_the_same_bytes_at_every_run(root, tmp_path):
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path in paths:
        export_coco(root, f"file://{path}")
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_labels_and_exports_may_lie_at_remote_addresses(root, tmp_path):
    remote = "memory://export/labels"
    storage.make_folder(remote)
    for name in storage.list_names(root):
        data = storage.read_bytes(storage.join(root, name))
        storage.write_atomic(storage.join(remote, name), lambda file, data=data: file.write(data))
    export_coco(root, str(tmp_path / "coco.json"))
    assert export_pngs(remote, "memory://export/pngs") == export_pngs(root, str(tmp_path / "pngs")) == len(LABELS)
    assert export_coco(remote, "memory://export/coco.json") == len(load(tmp_path / "coco.json").anns)
    assert storage.read_bytes("memory://export/coco.json") == (tmp_path / "coco.json").read_bytes()
    for file in (tmp_path / "pngs").iterdir():
        assert storage.read_bytes(f"memory://export/pngs/{file.name}") == file.read_bytes()
    assert export_pngs(remote, "memory://export/pngs") == len(LABELS)


def test_coco_takes_the_ids_that_it_is_given(root, tmp_path):
    images = {key: (100 - number, f"sub/{key}.png") for number, key in enumerate(LABELS)}
    categories = [(90, "hot dog"), (7, "dog"), (2, "cat"), (5, "unused")]
    export_coco(root, str(tmp_path / "coco.json"), categories=categories, images=images)
    coco = load(tmp_path / "coco.json")
    assert {image["file_name"]: image["id"] for image in coco.imgs.values()} == {n: i for i, n in images.values()}
    assert [(entry["id"], entry["name"]) for entry in coco.dataset["categories"]] == categories
    (image,) = (image for image in coco.imgs.values() if image["file_name"] == "sub/a.png")
    np.testing.assert_array_equal(repaint(coco, image), np.array([0, 2, 7, 90], np.uint8)[blocks() % 255])


def test_a_class_that_no_category_names_is_named_with_the_nearest(root, tmp_path):
    with pytest.raises(ValueError, match="'hot dog'; the nearest is 'hotdog'"):
        export_coco(root, str(tmp_path / "coco.json"), categories=[(1, "cat"), (2, "dog"), (3, "hotdog")])
    for twice in ([(1, "cat"), (1, "dog"), (3, "hot dog")], [(1, "cat"), (2, "dog"), (3, "hot dog"), (4, "cat")]):
        with pytest.raises(ValueError, match="listed twice"):
            export_coco(root, str(tmp_path / "coco.json"), categories=twice)


def test_a_key_without_an_image_id_is_named_and_the_old_file_stays(root, tmp_path):
    (tmp_path / "coco.json").write_text("old")
    with pytest.raises(ValueError, match="no image id for key 'c_1'; there are 4 keys, such as 'b'"):
        images = {key: (number, key) for number, key in enumerate(LABELS) if key != "c_1"}
        export_coco(root, str(tmp_path / "coco.json"), images=images)
    with pytest.raises(ValueError, match="two images have the id 1; the second is key 'a'"):
        export_coco(root, str(tmp_path / "coco.json"), images=dict.fromkeys(LABELS, (1, "x.jpg")))
    assert (tmp_path / "coco.json").read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["coco.json", "labels"]


def test_a_mask_of_a_foreign_class_or_size_is_named_and_nothing_is_written(tmp_path):
    foreign = write_labels(tmp_path / "foreign", [[Label("x", blocks(), (1,)), Label("y", blocks() + 1, (1,))]])
    with pytest.raises(ValueError, match=r"shard-000000.tar, key 'y' has values \[4\]"):
        export_coco(foreign, str(tmp_path / "coco.json"))
    png = grey_png(np.zeros((2, 2), np.uint8))
    other = write_labels(tmp_path / "size", [[Label("x", blocks(), (1,))]])
    facts = json.dumps({"labels": [1], "width": 11, "height": 8}).encode()
    write_tar(tmp_path / "size" / "shard-000000.tar", [("x.png", png), ("x.json", facts)])
    indexed_anew(tmp_path / "size")
    with pytest.raises(ValueError, match=r"key 'x': the mask is \(2, 2\), its row says \(8, 11\)"):
        export_coco(other, str(tmp_path / "coco.json"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["foreign", "size"]


def test_a_label_shard_that_was_damaged_is_named_and_nothing_of_it_exported(root, tmp_path):
    shard = sorted(Path(root).glob("shard-*.tar"))[-1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1  # of the same size, so that no marker notices
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{shard.name} is not as it was written .*; delete it, and the command"):
        export_pngs(str(root), str(tmp_path / "png"))
    with pytest.raises(ValueError, match="is not as it was written"):
        export_coco(str(root), str(tmp_path / "coco.json"))
    assert not (tmp_path / "coco.json").exists()


@pytest.mark.parametrize("change", ["other", "more", "fewer"])
def test_shards_that_are_not_what_the_table_lists_are_refused(tmp_path, change):
    shard = [*SHARDS[0]]
    root = write_labels(tmp_path / "labels", [shard])
    changed = {
        "other": [shard[1], shard[0], shard[2]],
        "more": [*shard, replace(shard[0], key="z")],
        "fewer": shard[:2],
    }
    write_labels(tmp_path / "changed", [changed[change]])
    (tmp_path / "changed" / "shard-000000.tar").replace(tmp_path / "labels" / "shard-000000.tar")
    indexed_anew(tmp_path / "labels")
    message = {"other": "'a' where samples.parquet lists key 'b'", "more": "'z' where .* no more", "fewer": "'nothing'"}
    with pytest.raises(ValueError, match=message[change]):
        export_coco(root, str(tmp_path / "coco.json"))


def test_a_member_that_leaves_the_folder_is_refused(tmp_path):
    root = write_labels(tmp_path / "labels", [[Label("x", blocks(), (1,))]])
    png = grey_png(blocks())
    write_tar(tmp_path / "labels" / "shard-000000.tar", [("../../x.png", png), ("../../x.json", b"{}")])
    indexed_anew(tmp_path / "labels")
    with pytest.raises(BrokenShardError, match=r"\.\./\.\./x\.png"):
        export_pngs(root, str(tmp_path / "a" / "pngs"))
    assert not list(tmp_path.glob("*.png")) and not list((tmp_path / "a").glob("*.png"))


def test_unfinished_labels_and_other_folders_are_refused(root, tmp_path):
    (tmp_path / "labels" / "index.json").rename(tmp_path / "index.json")
    with pytest.raises(ValueError, match="no finished folder of labels"):
        export_pngs(root, str(tmp_path / "pngs"))
    (tmp_path / "labels" / "index.json").write_text('{"kind": "dfa-shards", "format": 1}')
    with pytest.raises(ValueError, match="no index of dfa labels"):
        export_coco(root, str(tmp_path / "coco.json"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index.json", "labels"]


def test_a_place_that_cannot_be_written_is_named(root, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"cannot be exported to .*/file/pngs"):
        export_pngs(root, str(tmp_path / "file" / "pngs"))
    with pytest.raises(ValueError, match=r"cannot be exported to .*/file/coco.json"):
        export_coco(root, str(tmp_path / "file" / "coco.json"))


def test_exports_need_no_more_memory_for_more_shards(tmp_path):
    def peak(num_shards):
        shards = [[Label(f"k{number}", random_mask(256, 256), (1, 2, 3))] for number in range(num_shards)]
        root = write_labels(tmp_path / f"labels{num_shards}", shards)
        gc.collect()
        tracemalloc.start()
        export_coco(root, str(tmp_path / f"{num_shards}.json"))
        export_pngs(root, str(tmp_path / f"pngs{num_shards}"))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(2)  # imports and caches
    few, many = peak(4), peak(40)
    # Ten times the file: what is not streamed would be ten times as much. A few names and ids do grow.
    assert many < 1.3 * few, f"{few} bytes for 4 shards, {many} for 40"
    assert (tmp_path / "40.json").stat().st_size > many


def original(tmp_path, names):
    document = {
        "images": [{"id": 9, "file_name": "sub/a b.jpg"}, {"id": 4, "file_name": "c.v2.png"}],
        "annotations": [],
        "categories": [{"id": identity, "name": name} for identity, name in names],
    }
    (tmp_path / "original.json").write_text(json.dumps(document))
    return str(tmp_path / "original.json")


def test_original_ids_are_keyed_as_the_source_keys_its_images(tmp_path):
    path = original(tmp_path, [(90, "hot dog"), (2, "cat"), (7, "dog")])
    ids = read_original_ids(path, ["cat", "dog", "hot dog"])
    assert ids.categories == ((2, "cat"), (7, "dog"), (90, "hot dog"))
    assert ids.images == {"sub_a_b": (9, "sub/a b.jpg"), "c_v2": (4, "c.v2.png")}


def test_original_categories_that_are_not_the_classes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"original.json: no category is called 'dog'; the nearest is 'Dog'"):
        read_original_ids(original(tmp_path, [(1, "cat"), (2, "Dog")]), ["cat", "dog"])
    with pytest.raises(ValueError, match="no annotation file"):
        read_original_ids(str(tmp_path / "none.json"), ["cat"])


def test_original_images_that_share_a_key_are_named(tmp_path):
    path = original(tmp_path, [(1, "cat")])
    document = json.loads((tmp_path / "original.json").read_text())
    document["images"].append({"id": 5, "file_name": "sub/a_b.jpg"})
    (tmp_path / "original.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"'sub/a b.jpg' and 'sub/a_b.jpg' have the same key 'sub_a_b'"):
        read_original_ids(path, ["cat"])


def test_labels_of_real_coco_images_get_the_ids_of_the_original_file(sample_data, tmp_path):
    folder = sample_data / "coco_mini"
    annotations = str(folder / "annotations" / "instances_train2014.json")
    classes = ClassSet.from_mapping(yaml.safe_load((CONF / "classes_coco.yaml").read_text()))
    source = CocoSource(str(folder / "train2014"), annotations, classes)
    samples = [sample for sample in source if isinstance(sample, Sample)][:6]
    labels = [Label(s.key, random_mask(6, 9, (0, *s.labels)), s.labels) for s in samples]
    root = write_labels(tmp_path / "labels", [labels], classes.names)
    ids = read_original_ids(annotations, classes.names)
    export_coco(root, str(tmp_path / "coco.json"), categories=ids.categories, images=ids.images)
    ours, theirs = load(tmp_path / "coco.json"), load(annotations)
    assert len(ours.imgs) == 6 and max(ours.getCatIds()) == 90
    assert all(theirs.imgs[identity]["file_name"] == image["file_name"] for identity, image in ours.imgs.items())
    assert {(c["id"], c["name"]) for c in ours.cats.values()} == {(c["id"], c["name"]) for c in theirs.cats.values()}
    for label, image in zip(labels, ours.dataset["images"], strict=True):
        names = {classes.names[value - 1] for value in np.unique(label.mask_HW) if value}
        assert names == {ours.cats[each["category_id"]]["name"] for each in ours.imgToAnns[image["id"]]}


def test_annotations_that_do_not_list_the_images_are_refused_with_both_sides_named(tmp_path):
    samples = []
    for key in ("a", "b", "c"):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"{key}.png")
        samples.append(Sample(key, str(tmp_path / f"{key}.png"), (1,)))
    index = write_images(tmp_path / "shards", samples, names=NAMES, per_shard=2)
    listed = OriginalIds(((1, "cat"),), {key: (number, f"{key}.jpg") for number, key in enumerate("abc")})
    check_listed(listed, index, where="all.json")
    del listed.images["a"], listed.images["c"]
    with pytest.raises(ValueError, match=r"val.json does not list 2 of the 3 images of .*shards: \['a', 'c'\].* 'b'"):
        check_listed(listed, index, where="val.json")


def test_places_for_exports_are_tried_and_left_as_they_were(tmp_path):
    (tmp_path / "pngs").mkdir()
    (tmp_path / "coco.json").write_text("mine")
    check_folder(str(tmp_path / "pngs"))
    check_folder(str(tmp_path / "deep/quality"))
    check_file(str(tmp_path / "coco.json"))
    check_file(str(tmp_path / "new/coco.json"))
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"coco.json"} and (tmp_path / "coco.json").read_text() == "mine"
    for check, address in ((check_folder, "coco.json/pngs"), (check_file, "pngs"), (check_file, "coco.json/x.json")):
        with pytest.raises(UnwritableError, match=f"cannot be exported to {tmp_path}/{address}"):
            check(str(tmp_path / address))
    check_folder("memory://exports/pngs")
    assert storage.list_names("memory://exports/pngs") == []
