"""Writing shards, restarting, indexing, verifying and reading them."""

import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import webdataset
import yaml
from PIL import Image

from dfa.data import shards, storage
from dfa.data.classes import ClassSet
from dfa.data.shards import BrokenShardError, load_index, read_samples, read_shard, samples_by_shard, verify
from dfa.data.sources import CocoSource, MaskFile, MaskSegments, Reject, Sample, VocSource, mask_array
from dfa.data.transforms import decode_mask, decode_rgb
from dfa.data.writer import finish, pending, plan_shards, write_plan, write_shard
from tests.data.object_store import DisturbedWay, address, object_store

SETTINGS = {
    "class_names": ("cat", "dog"),
    "seed": 0,
    "shuffle": True,
    "samples_per_shard": 4,
    "max_pixels": 100_000,
}
CONF = Path(__file__).parents[2] / "conf"


def save_image(path, mode="RGB", size=(40, 30), seed=0, **options):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path, **options)
    return str(path)


def save_mask(path, size=(40, 30)):
    Image.fromarray(np.tile(np.array([0, 1, 2, 255], np.uint8), (size[1], size[0] // 4))).save(path)
    return MaskFile(str(path))


@pytest.fixture
def samples(tmp_path):
    """Ten samples: every third without a mask, one of them a PNG."""
    folder = tmp_path / "images"
    folder.mkdir()
    found = []
    for number in range(10):
        image = save_image(folder / f"{number}.{'png' if number == 5 else 'jpg'}", seed=number)
        mask = save_mask(folder / f"{number}_mask.png") if number % 3 else None
        found.append(Sample(f"key{number}", image, (1,) if number % 2 else (1, 2), mask))
    return found


def shard_all(root, plan, max_reject_share=0.0):
    write_plan(str(root), plan)
    for item in pending(str(root), plan):
        write_shard(str(root), item)
    return finish(str(root), plan, max_reject_share=max_reject_share)


def contents(root):
    return {path.name: path.read_bytes() for path in sorted(Path(root).iterdir())}


# Writing


def test_what_is_written_is_what_was_read(samples, tmp_path):
    index = shard_all(tmp_path / "shards", plan_shards(samples, **SETTINGS))
    assert index == load_index(index.root)
    assert (index.num_samples, len(index.shards), index.class_names) == (10, 3, ("cat", "dog"))
    assert sorted(shard.num_samples for shard in index.shards) == [3, 3, 4]
    assert index.class_histogram == (10, 5)
    by_key = {sample.key: sample for sample in samples}
    raws = [raw for shard in index.shards for raw in read_shard(index.path(shard.name))]
    assert sorted(raw.key for raw in raws) == sorted(by_key)
    for raw in raws:
        sample = by_key[raw.key]
        assert raw.image == Path(sample.image).read_bytes()
        assert (raw.labels, raw.width, raw.height) == (sample.labels, 40, 30)
        assert raw.mask == (Path(sample.mask.path).read_bytes() if sample.mask else None)
    rows = read_samples(index)
    assert [(r.key, r.shard, r.row, r.labels, r.width, r.height, r.has_mask) for r in rows] == [
        (raw.key, raw.shard, raw.row, raw.labels, 40, 30, raw.mask is not None) for raw in raws
    ]
    assert verify(index.root) == ()


def test_webdataset_alone_reads_the_shards(samples, tmp_path):
    index = shard_all(tmp_path / "shards", plan_shards(samples, **SETTINGS))
    urls = [index.path(shard.name) for shard in index.shards]
    ours = [raw for url in urls for raw in read_shard(url)]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in theirs] == [raw.key for raw in ours]
    for sample, raw in zip(theirs, ours, strict=True):
        image = sample["jpg"] if "jpg" in sample else sample["png"]
        np.testing.assert_array_equal(image, decode_rgb(raw.image, max_pixels=10_000))
        assert tuple(sample["json"]["labels"]) == raw.labels and sample["json"]["names"][0] == "cat"
        assert ("mask.png" in sample) == (raw.mask is not None)


def test_two_runs_write_the_same_bytes(samples, tmp_path):
    for name in ("one", "two"):
        shard_all(tmp_path / name, plan_shards(samples, **SETTINGS))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_shuffled_order_depends_on_seed_and_keys_alone(samples):
    def order(plan):
        return [sample.key for item in plan.items for sample in item.samples]

    first = plan_shards(samples, **SETTINGS)
    assert order(first) == order(plan_shards(samples[::-1], **SETTINGS))
    assert order(first) != order(plan_shards(samples, **{**SETTINGS, "seed": 1}))
    assert order(plan_shards(samples, **{**SETTINGS, "shuffle": False})) == [sample.key for sample in samples]


def test_plan_items_travel_to_other_processes(samples):
    plan = plan_shards(samples, **SETTINGS)
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_painted_annotations_become_palette_masks(tmp_path):
    from pycocotools import mask as coco_mask

    from dfa.data.sources import Segment

    region = np.zeros((30, 40), np.uint8, order="F")
    region[5:10, 5:20] = 1
    segments = MaskSegments(30, 40, (Segment(2, coco_mask.encode(region)["counts"]),))
    sample = Sample("a", save_image(tmp_path / "a.jpg"), (2,), segments)
    index = shard_all(tmp_path / "shards", plan_shards([sample], **SETTINGS))
    raw = next(read_shard(index.path(index.shards[0].name)))
    np.testing.assert_array_equal(decode_mask(raw.mask, max_pixels=10_000), region * 2)
    assert Image.open(io.BytesIO(raw.mask)).convert("RGB").getpixel((6, 6)) == (0, 128, 0)


# Rejects


def test_bad_samples_are_left_out_with_their_reasons(samples, tmp_path):
    folder = tmp_path / "images"
    data = Path(samples[0].image).read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.jpg").write_text("hello")
    Image.new("RGB", (40, 30)).save(folder / "rgb_mask.png")
    bad = {
        "cut": ("cut.jpg", (1,), None, "does not decode completely"),
        "text": ("text.jpg", (1,), None, "not a JPEG or PNG"),
        "gone": ("gone.jpg", (1,), None, "No such file"),
        "big": (save_image(folder / "big.jpg", size=(400, 300)), (1,), None, "more than max_pixels=100000"),
        "size": ("0.jpg", (1,), save_mask(folder / "size_mask.png", (36, 30)), "mask is 36 x 30, image is 40 x 30"),
        "rgb": ("0.jpg", (1,), MaskFile(str(folder / "rgb_mask.png")), "mode RGB"),
        "label": ("0.jpg", (3,), None, "labels (3,) are outside 1..2"),
    }
    for key, (name, labels, mask, _) in bad.items():
        samples.append(Sample(key, str(folder / name), labels, mask))
    samples.append(Reject("early", "x.jpg", "no image-level label"))
    root = tmp_path / "shards"
    with pytest.raises(ValueError, match=r"8 of 18 images rejected \(44.44%\), allowed are 10.00%; reasons in"):
        shard_all(root, plan_shards(samples, **SETTINGS), max_reject_share=0.1)
    with pytest.raises(ValueError, match="sharding was not finished"):
        load_index(str(root))
    before = contents(root)
    index = shard_all(root, plan_shards(samples, **SETTINGS), max_reject_share=0.5)
    assert (index.num_samples, index.num_rejects) == (10, 8)
    assert {name: data for name, data in contents(root).items() if name != "index.json"} == before
    rejects = [json.loads(line) for line in (root / "rejects.jsonl").read_text().splitlines()]
    assert {reject["key"] for reject in rejects} == {*bad, "early"}
    for reject in rejects:
        assert reject["key"] == "early" or bad[reject["key"]][3] in reject["reason"]


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_gray_and_cmyk_images_are_kept_as_they_are(tmp_path, mode):
    image = save_image(tmp_path / "a.jpg", mode=mode)
    index = shard_all(tmp_path / "shards", plan_shards([Sample("a", image, (1,))], **SETTINGS))
    assert next(read_shard(index.path("shard-000000.tar"))).image == Path(image).read_bytes()


def test_members_are_named_for_the_real_format(tmp_path):
    save_image(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    index = shard_all(tmp_path / "shards", plan_shards([Sample("a", str(tmp_path / "a.jpg"), (1,))], **SETTINGS))
    with tarfile.open(index.path("shard-000000.tar")) as tar:
        assert tar.getnames() == ["a.png", "a.json"]


def test_exif_orientation_is_announced(tmp_path, caplog):
    exif = Image.Exif()
    exif[274] = 6
    image = save_image(tmp_path / "a.jpg", exif=exif)
    shard_all(tmp_path / "shards", plan_shards([Sample("a", image, (1,))], **SETTINGS))
    assert "1 images carry an EXIF orientation" in caplog.text


def test_a_shard_of_rejects_only_is_not_in_the_index(samples, tmp_path):
    broken = [replace(sample, image="gone.jpg") for sample in samples[:4]] + samples[4:]
    index = shard_all(tmp_path / "s", plan_shards(broken, **{**SETTINGS, "shuffle": False}), max_reject_share=0.5)
    assert index.num_samples == 6 and all(shard.num_samples > 0 for shard in index.shards)
    with pytest.raises(ValueError, match="no usable sample; 1 rejected: k: no image-level label"):
        plan_shards([Reject("k", "p", "no image-level label")], **SETTINGS)


def test_two_images_with_one_key_are_an_error(samples):
    with pytest.raises(ValueError, match=r"two images have the key 'key1': .*1.jpg and .*other.jpg"):
        plan_shards([*samples, replace(samples[1], image="other.jpg")], **SETTINGS)
    with pytest.raises(ValueError, match=r"'a.b' of .* is not clean"):
        plan_shards([replace(samples[1], key="a.b")], **SETTINGS)


# Folders that are not ours, interruption


def test_a_foreign_folder_is_refused(samples, tmp_path):
    plan = plan_shards(samples, **SETTINGS)
    (tmp_path / "thesis.doc").write_text("precious")
    with pytest.raises(ValueError, match=r"is not empty and holds no dfa shards \(2 entries: images, thesis.doc"):
        write_plan(str(tmp_path), plan)
    (tmp_path / "images" / "plan.json").write_text('{"kind": "holiday"}')
    with pytest.raises(ValueError, match="is no plan of dfa shards"):
        write_plan(str(tmp_path / "images"), plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "seed was 0, is 7"),
        ({"class_names": ("cat", "cow")}, r"class_names was \['cat', 'dog'\], is \['cat', 'cow'\]"),
        ({"max_pixels": 5}, "max_pixels was 100000, is 5"),
        ({}, "other paths, labels or masks"),
    ],
)
def test_a_folder_of_another_configuration_is_refused(samples, tmp_path, change, message):
    write_plan(str(tmp_path / "s"), plan_shards(samples, **SETTINGS))
    if not change:
        samples[0] = replace(samples[0], labels=(2,))
    with pytest.raises(ValueError, match=message):
        write_plan(str(tmp_path / "s"), plan_shards(samples, **{**SETTINGS, **change}))


def test_a_kill_between_shard_and_marker_is_repaired_by_a_restart(samples, tmp_path):
    plan, root = plan_shards(samples, **SETTINGS), tmp_path / "killed"
    shard_all(tmp_path / "whole", plan)
    write_plan(str(root), plan)
    (tmp_path / "item.pickle").write_bytes(pickle.dumps(plan.items[1]))
    code = f"""
import os, pickle, signal
from dfa.data.writer import write_shard
rename = os.replace
def replace(source, target):
    if target.endswith(".json"):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = replace
write_shard({str(root)!r}, pickle.load(open({str(tmp_path / "item.pickle")!r}, "rb")))
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -signal.SIGKILL
    names = os.listdir(root)
    assert "shard-000001.tar" in names and "shard-000001.json" not in names
    assert sum(name.endswith(".partial") for name in names) == 1
    assert [item.shard for item in pending(str(root), plan)] == [f"shard-{n:06d}.tar" for n in range(3)]
    shard_all(root, plan)
    assert contents(root) == contents(tmp_path / "whole")


def test_a_restart_repeats_only_what_is_not_committed(samples, tmp_path):
    plan, root = plan_shards(samples, **SETTINGS), tmp_path / "s"
    shard_all(root, plan)
    whole = contents(root)
    assert pending(str(root), plan) == ()
    (root / "shard-000000.json").unlink()
    (root / "shard-000001.tar").write_bytes(whole["shard-000001.tar"][:-512])
    (root / "shard-000002.json").write_text("{")
    assert len(pending(str(root), plan)) == 3
    with pytest.raises(ValueError, match=r"3 of 3 shards are not written: \['shard-000000.tar'"):
        finish(str(root), plan, max_reject_share=0)
    shard_all(root, plan)
    assert contents(root) == whole


def test_a_shard_of_other_labels_does_not_count_as_committed(samples, tmp_path):
    plan, root = plan_shards(samples, **SETTINGS), tmp_path / "s"
    shard_all(root, plan)
    first = plan.items[0].samples[0]
    other = [replace(s, labels=(2,)) if s.key == first.key else s for s in samples]
    assert [item.shard for item in pending(str(root), plan_shards(other, **SETTINGS))] == ["shard-000000.tar"]


# Verifying and reading


def test_verify_lists_missing_and_changed_shards(samples, tmp_path):
    index = shard_all(tmp_path / "s", plan_shards(samples, **{**SETTINGS, "samples_per_shard": 3}))
    paths = [Path(index.path(shard.name)) for shard in index.shards]
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes() + b"x")
    data = bytearray(paths[2].read_bytes())
    data[700] ^= 1
    paths[2].write_bytes(data)
    problems = verify(index.root)
    assert [problem.split(":")[0] for problem in problems] == [path.name for path in paths[:3]]
    assert "missing" in problems[0] and "bytes, index says" in problems[1] and "sha256" in problems[2]


def test_wanted_rows_and_keys_are_read_alone(samples, tmp_path):
    index = shard_all(tmp_path / "s", plan_shards(samples, **{**SETTINGS, "samples_per_shard": 10}))
    path = index.path("shard-000000.tar")
    keys = [raw.key for raw in read_shard(path)]
    assert [(raw.row, raw.key) for raw in read_shard(path, wanted={7, 2})] == [(2, keys[2]), (7, keys[7])]
    assert [raw.row for raw in read_shard(path, wanted={keys[4]})] == [4]
    assert list(read_shard(path, wanted=set())) == []
    with pytest.raises(BrokenShardError, match=rf"has no \['99'\]; its last sample is key '{keys[9]}'"):
        list(read_shard(path, wanted={1, 99}))


def test_any_truncation_is_noticed_and_names_the_last_good_key(samples, tmp_path):
    index = shard_all(tmp_path / "s", plan_shards(samples, **{**SETTINGS, "samples_per_shard": 10}))
    data = Path(index.path("shard-000000.tar")).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        ends = [m.offset for m in tar.getmembers()] + [tar.offset]
    cuts = {*ends[1:], *(end + 200 for end in ends), *(end + 600 for end in ends[:-1]), len(data) // 2}
    assert len(cuts) > 60
    whole = list(read_shard(index.path("shard-000000.tar")))
    path = tmp_path / "cut.tar"
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        good = []
        with pytest.raises(BrokenShardError, match=r"cut\.tar cannot be read after") as error:
            for raw in read_shard(str(path)):
                assert replace(raw, shard="shard-000000.tar") == whole[raw.row]  # never a sample that lost its mask
                good.append(raw.key)
        assert (f"key {good[-1]!r}" if good else "no good sample") in str(error.value)


def test_a_damaged_header_in_the_middle_is_noticed(samples, tmp_path):
    index = shard_all(tmp_path / "s", plan_shards(samples, **{**SETTINGS, "samples_per_shard": 10}))
    path = Path(index.path("shard-000000.tar"))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        middle = tar.getmembers()[9].offset
    data[middle + 3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(BrokenShardError, match="truncated or damaged"):
        list(read_shard(str(path)))


def tar_of(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_foreign_and_unsafe_members_are_refused(tmp_path):
    label = b'{"labels": [1], "width": 2, "height": 2}'
    link = tarfile.TarInfo("a.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    cases = {
        "not a plain file": [("../evil.jpg", b"x")],
        "not a plain file KEY": [(link, b"")],
        "occurs twice": [("a.jpg", b"x"), ("a.jpg", b"y")],
        "found \\['jpg'\\]": [("a.jpg", b"x")],
        "found \\['json'\\]": [("a.json", label)],
        "label is not valid JSON": [("a.jpg", b"x"), ("a.json", b"{")],
        "needed are positive integers": [("a.jpg", b"x"), ("a.json", b'{"labels": 3, "width": 2, "height": 2}')],
        "needed are positive": [("a.jpg", b"x"), ("a.json", b'{"labels": ["1"], "width": 2, "height": 2}')],
    }
    for message, members in cases.items():
        path = tar_of(tmp_path / "x.tar", *members)
        with pytest.raises(BrokenShardError, match=message):
            list(read_shard(path))
    path = tar_of(tmp_path / "x.tar", ("a.jpg", b"x"), ("a.json", label), ("a.caption.txt", b"more"))
    assert next(read_shard(path)).labels == (1,)


def test_an_index_that_is_not_there_or_not_ours_is_named(tmp_path):
    with pytest.raises(ValueError, match="no shard folder"):
        load_index(str(tmp_path / "nowhere"))
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="is no index of dfa shards"):
        load_index(str(tmp_path))
    (tmp_path / "index.json").write_text('{"kind": "dfa-shards", "format": 99}')
    with pytest.raises(ValueError, match="format 99; this version reads format 1"):
        load_index(str(tmp_path))
    with pytest.raises(ValueError, match="nope://bucket/x: neither Arrow nor fsspec"):
        load_index("nope://bucket/x")


# samples.parquet, shard by shard


def test_samples_come_shard_by_shard_in_order(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_ROWS_AT_A_TIME", 3)  # batches that end inside shards
    index = shard_all(tmp_path / "s", plan_shards(samples, **SETTINGS))
    found = list(samples_by_shard(index, limit=None))
    assert [shard for shard, _ in found] == list(index.shards)
    assert tuple(row for _, rows in found for row in rows) == read_samples(index)
    for shard, rows in found:
        raws = list(read_shard(index.path(shard.name)))
        assert [(row.key, row.row, row.labels) for row in rows] == [(raw.key, raw.row, raw.labels) for raw in raws]


@pytest.mark.parametrize(
    ("limit", "sizes"), [(0, []), (2, [2]), (3, [3]), (5, [3, 2]), (10, [3, 3, 4]), (99, [3, 3, 4])]
)
def test_a_limit_cuts_the_last_shard_and_leaves_out_those_after_it(samples, tmp_path, limit, sizes):
    index = shard_all(tmp_path / "s", plan_shards(samples, **SETTINGS))
    assert [len(rows) for _, rows in samples_by_shard(index, limit=limit)] == sizes


def test_samples_that_do_not_fit_the_index_are_named(samples, tmp_path):
    index = shard_all(tmp_path / "s", plan_shards(samples, **SETTINGS))
    first, second, third = index.shards
    other = {
        r"samples\.parquet has 10 rows, index\.json says 11": replace(index, num_samples=11),
        r"is row 0 of shard-000000\.tar, index\.json has row 0 of shard-000001": replace(
            index, shards=(second, first, third)
        ),
        r"ends after 4 of the 5 samples of shard-000002": replace(
            index, shards=(first, second, replace(third, num_samples=5))
        ),
    }
    for message, wrong in other.items():
        with pytest.raises(ValueError, match=message):
            read_samples(wrong)
    with pytest.raises(ValueError, match="limit=-1 must be at least 0"):
        list(samples_by_shard(index, limit=-1))
    table = pyarrow.parquet.read_table(tmp_path / "s" / "samples.parquet")
    pyarrow.parquet.write_table(table.drop_columns(["labels"]), tmp_path / "s" / "samples.parquet")
    with pytest.raises(ValueError, match=r"samples\.parquet has no columns \['labels'\]"):
        read_samples(index)
    (tmp_path / "s" / "samples.parquet").write_text("no parquet at all")
    with pytest.raises(ValueError, match=r"samples\.parquet is no parquet file"):
        read_samples(index)


def test_a_shard_is_read_from_content_that_the_caller_holds(samples, tmp_path):
    index = shard_all(tmp_path / "s", plan_shards(samples, **SETTINGS))
    path = index.path(index.shards[0].name)
    whole, content = list(read_shard(path)), io.BytesIO(Path(path).read_bytes())
    Path(path).unlink()
    for _ in range(2):
        assert list(read_shard(path, file=content)) == whole
    assert next(read_shard(path, wanted={1}, file=content)) == whole[1] and not content.closed
    with pytest.raises(BrokenShardError, match=r"shard-000000\.tar cannot be read after"):
        list(read_shard(path, file=io.BytesIO(content.getvalue()[:1000])))


# Shards in an object store


def test_a_marker_that_cannot_be_fetched_does_not_count_as_unwritten(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_PAUSE_S", 0.0)
    plan = plan_shards(samples, **SETTINGS)
    with object_store() as port:
        shard_all(address(port, "x"), plan)
        way = DisturbedWay(port)
        way.refuse, way.refusals = b"GET /bucket/x/shard-000001.json", 3
        with pytest.raises(storage.StoreError, match=r"shard-000001\.json.*ACCESS_DENIED"):
            pending(address(way.port, "x"), plan)
        assert pending(address(way.port, "x"), plan) == ()
        way.close()


def test_shards_in_an_object_store_are_those_of_a_folder(samples, tmp_path):
    plan = plan_shards(samples, **SETTINGS)
    local = shard_all(tmp_path / "s", plan)
    with object_store() as port:
        root = address(port, "voc/train")
        with pytest.raises(ValueError, match="no shard folder s3://"):
            load_index(root)
        write_plan(root, plan)
        write_shard(root, plan.items[0])
        with pytest.raises(ValueError, match="2 of 3 shards are not written"):
            finish(root, plan, max_reject_share=0)
        index = shard_all(root, plan)
        assert index == load_index(root) == replace(local, root=root)
        assert {name: storage.read_bytes(storage.join(root, name)) for name in storage.list_names(root)} == contents(
            tmp_path / "s"
        )
        assert read_samples(index) == read_samples(local) and verify(root) == () and pending(root, plan) == ()
        path = index.path("shard-000002.tar")
        assert list(read_shard(path, wanted={1})) == [list(read_shard(local.path("shard-000002.tar")))[1]]
        data = bytearray(storage.read_bytes(path))
        data[700] ^= 1
        storage.write_atomic(path, lambda file: file.write(data))
        storage.remove(index.path("shard-000000.tar"))
        assert [line.partition(": ")[::2] for line in verify(root)] == [
            ("shard-000000.tar", "missing"),
            ("shard-000002.tar", "content differs from the sha256 in the index"),
        ]


# Real data


def real_classes(name):
    return ClassSet.from_mapping(yaml.safe_load((CONF / f"classes_{name}.yaml").read_text()))


def test_real_voc_and_coco_go_through_shards(sample_data, tmp_path):
    voc, coco = real_classes("voc"), real_classes("coco")
    label_file = str(sample_data / "voc_mini" / "image_labels.txt")
    mini = sample_data / "coco_mini"
    sources = {
        "voc": VocSource(
            str(sample_data / "voc_mini"), "train", voc, label_file=label_file, masks="SegmentationClassAug"
        ),
        "coco": CocoSource(
            str(mini / "val2014"), str(mini / "annotations" / "instances_val2014.json"), coco, masks=True
        ),
    }
    for name, source in sources.items():
        settings = {**SETTINGS, "class_names": source.classes.names, "samples_per_shard": 16, "max_pixels": 10**7}
        found = list(source)
        index = shard_all(tmp_path / name, plan_shards(found, **settings), max_reject_share=0.05)
        assert verify(index.root) == ()
        by_key = {sample.key: sample for sample in found if isinstance(sample, Sample)}
        raws = [raw for shard in index.shards for raw in read_shard(index.path(shard.name))]
        assert len(raws) == len(by_key) == index.num_samples
        for raw in raws:
            sample = by_key[raw.key]
            assert hashlib.sha256(raw.image).digest() == hashlib.sha256(Path(sample.image).read_bytes()).digest()
            mask = decode_mask(raw.mask, max_pixels=10**7)
            np.testing.assert_array_equal(mask, mask_array(sample, num_classes=source.classes.num_classes))
            assert mask.shape == (raw.height, raw.width)
