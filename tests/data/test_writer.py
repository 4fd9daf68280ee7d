"""Writing shards: the same bytes at every attempt, rejects with reasons, restarts."""

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
import pytest
import webdataset
from PIL import Image

from dfa.data import storage
from dfa.data.planning import plan_shards, write_plan
from dfa.data.samples import summarize_rejects
from dfa.data.shards import load_index, read_samples, read_shard
from dfa.data.sources import MaskFile, MaskSegments, Reject, Sample
from dfa.data.transforms import decode_mask, decode_rgb
from dfa.data.writer import finish, pending
from tests.data.object_store import DisturbedWay, address, object_store
from tests.data.shard_sets import SETTINGS, contents, hashes_are_true, save_image, save_mask, shard_all


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
    assert hashes_are_true(index)


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
    with pytest.raises(
        ValueError, match=r"8 of 18 images rejected \(44.44%\), allowed are 10.00% \(data\.max_reject_share\); reasons"
    ):
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


def test_exif_orientation_is_announced_and_applied_where_that_is_asked_for(tmp_path, caplog):
    exif = Image.Exif()
    exif[274] = 6
    image = save_image(tmp_path / "a.jpg", size=(40, 32), exif=exif)
    mask = save_mask(tmp_path / "a.png", size=(32, 40))  # painted on the picture as viewers show it
    samples = [Sample("a", image, (1,)), Sample("b", image, (1,), mask)]
    stored = shard_all(tmp_path / "stored", plan_shards(samples, **SETTINGS), max_reject_share=0.5)
    assert "1 images carry an EXIF orientation; their pixels are used as stored (data.apply_exif" in caplog.text
    assert [(row.key, row.width, row.height) for row in read_samples(stored)] == [("a", 40, 32)]
    assert "data.apply_exif" in (tmp_path / "stored" / "rejects.jsonl").read_text()
    caplog.clear()
    shown = shard_all(tmp_path / "shown", plan_shards(samples, **SETTINGS, apply_exif=True))
    assert "2 images carry an EXIF orientation; their pixels are used as viewers turn them" in caplog.text
    assert [(row.key, row.width, row.height) for row in read_samples(shown)] == [("a", 32, 40), ("b", 32, 40)]
    [raw, _] = read_shard(shown.path("shard-000000.tar"))
    assert decode_rgb(raw.image, max_pixels=10**4).shape == (40, 32, 3) and (raw.width, raw.height) == (32, 40)


def test_a_summary_of_rejects_shows_each_kind_of_reason_once():
    reasons = ["no label"] * 5 + [
        "unknown class 'dragon' (t.csv line 4)",
        "unknown class 'orc' (t.csv line 9)",
        "file is empty",
    ]
    told = summarize_rejects(Reject(f"k{n}", f"k{n}.jpg", reason) for n, reason in enumerate(reasons))
    assert told == (
        "k0: no label (and 4 like it); k5: unknown class 'dragon' (t.csv line 4) (and 1 like it); k7: file is empty"
    )
    assert summarize_rejects([Reject("k", "k.jpg", word) for word in "abcdef"]).endswith("d; and 2 more kinds")


def test_a_damaged_exif_block_is_no_reason_to_reject(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    image = Path(save_image(tmp_path / "a.jpg", exif=exif))
    data = bytearray(image.read_bytes())
    place = data.index(b"Exif\0\0") + 6
    data[place : place + 4] = b"damn"
    image.write_bytes(data)
    samples = [Sample("a", str(image), (1,))]
    for apply_exif in (False, True):
        plan = plan_shards(samples, **SETTINGS, apply_exif=apply_exif)
        assert shard_all(tmp_path / f"shards{apply_exif}", plan).num_samples == 1


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
