"""Reading, indexing and verifying shards."""

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from dfa.data import shards, storage
from dfa.data.classes import ClassSet
from dfa.data.planning import plan_shards, write_plan
from dfa.data.shards import BrokenShardError, load_index, read_samples, read_shard, samples_by_shard
from dfa.data.sources import CocoSource, Sample, VocSource, mask_array
from dfa.data.transforms import decode_mask
from dfa.data.writer import finish, pending, write_shard
from tests.data.object_store import address, object_store
from tests.data.shard_sets import SETTINGS, contents, hashes_are_true, shard_all

CONF = Path(__file__).parents[2] / "conf"


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
        assert read_samples(index) == read_samples(local) and hashes_are_true(index) and pending(root, plan) == ()
        path = index.path("shard-000002.tar")
        assert list(read_shard(path, wanted={1})) == [list(read_shard(local.path("shard-000002.tar")))[1]]


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
        assert hashes_are_true(index)
        by_key = {sample.key: sample for sample in found if isinstance(sample, Sample)}
        raws = [raw for shard in index.shards for raw in read_shard(index.path(shard.name))]
        assert len(raws) == len(by_key) == index.num_samples
        for raw in raws:
            sample = by_key[raw.key]
            assert hashlib.sha256(raw.image).digest() == hashlib.sha256(Path(sample.image).read_bytes()).digest()
            mask = decode_mask(raw.mask, max_pixels=10**7)
            np.testing.assert_array_equal(mask, mask_array(sample, num_classes=source.classes.num_classes))
            assert mask.shape == (raw.height, raw.width)
