"""The factory with a scorer that needs no model: restarts, order, rejects, damage, lost workers.

What a pool of workers cannot change runs in this process; what Ray does to work, errors and processes runs on Ray.
"""

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet
import pytest
import torch
import webdataset
from PIL import Image

from dfa.data import storage
from dfa.data.listing import list_images
from dfa.data.shards import load_index, read_shard
from dfa.label import factory
from dfa.label.images import ListedImages
from dfa.label.slots import Share
from dfa.label.work import LocalPool
from tests.data.object_store import DisturbedWay, address, object_store
from tests.label.by_hand import confusion, mask_of, refined
from tests.label.colours import (
    CLASSES,
    SETTINGS,
    colour_pass,
    colour_plan,
    colour_scores,
    label_bytes,
    make_scorers,
    write_images,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shards(tmp_path):
    """Ten images of three sizes in three shards."""
    return write_images(tmp_path, sizes=[[(12, 16), (16, 12), (13, 17)][n % 3] for n in range(10)], samples_per_shard=4)


def _run(index, output, **options):
    """In this process."""
    return factory.run(colour_plan(colour_pass(index, output, **options)), LocalPool())["colours"]


def _run_on_ray(index, output, **options):
    """On two scorers: there are three batches."""
    return factory.run(colour_plan(colour_pass(index, output, **options), batch_images=4))["colours"]


@pytest.mark.usefixtures("ray_session")
def test_rays_workers_and_this_process_write_the_same_bytes_and_counts(shards, tmp_path):
    settings = replace(SETTINGS, soft=True, confidence=True)
    there = _run_on_ray(shards, tmp_path / "there", settings=settings)
    here = _run(shards, tmp_path / "here", settings=settings)
    assert there.images_now == here.images_now == 10
    assert label_bytes(tmp_path / "there") == label_bytes(tmp_path / "here")
    for name in ("mask_CC", "argmax_CC", "sweep_TCC", "pixels_C"):
        assert getattr(there.report.tally, name).equal(getattr(here.report.tally, name))
    assert set(there.work_s) == set(here.work_s) == {"read", "cam", "crf", "encode"}


def test_a_restart_labels_what_is_missing_to_the_same_bytes(shards, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    first = _run(shards, whole)
    assert (first.images_now, first.report.num_samples) == (10, 10)
    again = _run(shards, whole)
    assert again.images_now == 0
    assert again.report.tally.mask_CC.equal(first.report.tally.mask_CC)
    shutil.copytree(whole, broken)
    # As if killed: one marker never written, one shard cut short, no index, an attempt left behind.
    (broken / "shard-000001.json").unlink()
    (broken / "shard-000002.tar").write_bytes((broken / "shard-000002.tar").read_bytes()[:-1024])
    (broken / "index.json").unlink()
    (broken / ".shard-000001.tar.0.partial").write_bytes(b"half")
    mended = _run(shards, broken)
    assert mended.images_now == sum(one.num_samples for one in shards.shards[1:])
    assert label_bytes(broken) == label_bytes(whole)
    assert mended.report.tally.sweep_TCC.equal(first.report.tally.sweep_TCC)


def test_labels_join_the_images_by_key_and_are_those_of_the_crf_library_and_a_loop(shards, tmp_path):
    report = _run(shards, tmp_path / "labels").report
    pairs = []
    for entry in shards.shards:
        images = list(read_shard(shards.path(entry.name)))
        labels = list(read_shard(f"{report.root}/{entry.name}"))
        assert [one.key for one in labels] == [one.key for one in images]
        assert [one.labels for one in labels] == [one.labels for one in images]
        for image, label in zip(images, labels, strict=True):
            pixels_HW3 = np.array(Image.open(io.BytesIO(image.image)))
            (scores,) = colour_scores([torch.from_numpy(pixels_HW3).permute(2, 0, 1)], [image.labels])
            expected_HW = mask_of(refined(pixels_HW3, scores.score_KHW, SETTINGS.crf), scores.class_ids)
            np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(label.image))), expected_HW)
            pairs.append((np.array(Image.open(io.BytesIO(image.mask))), expected_HW))
    assert report.tally.mask_CC.tolist() == confusion(pairs, 3).tolist()
    assert report.tally.num_truth == 10
    assert _run(shards, tmp_path / "few", limit=5).report.num_samples == 5


def test_soft_maps_confidence_and_quality_are_read_by_webdataset_pil_and_parquet_alone(shards, tmp_path):
    settings = replace(SETTINGS, soft=True, confidence=True, min_confidence=0.98)
    report = _run(shards, tmp_path / "labels", settings=settings).report
    rows = {row["key"]: row for row in pyarrow.parquet.read_table(f"{report.root}/samples.parquet").to_pylist()}
    images = {raw.key: raw for entry in shards.shards for raw in read_shard(shards.path(entry.name))}
    seen = num_void = 0
    for entry in shards.shards:
        for sample in webdataset.WebDataset(f"{report.root}/{entry.name}", shardshuffle=False):
            key, note, raw = sample["__key__"], json.loads(sample["json"]), images[sample["__key__"]]
            mask_HW, soft, best_HW = (
                np.array(Image.open(io.BytesIO(sample[name]))) for name in ("png", "soft.png", "confidence.png")
            )
            soft_KHW = soft.reshape(len(note["classes"]), *mask_HW.shape)
            pixels_HW3 = np.array(Image.open(io.BytesIO(raw.image)))
            (scores,) = colour_scores([torch.from_numpy(pixels_HW3).permute(2, 0, 1)], [raw.labels])
            probability_KHW = refined(pixels_HW3, scores.score_KHW, settings.crf)
            assert note["classes"] == [0, *raw.labels]
            np.testing.assert_array_equal(mask_HW, mask_of(probability_KHW, note["classes"], 0.98))
            np.testing.assert_array_equal(soft_KHW, np.rint(255 * probability_KHW))
            np.testing.assert_array_equal(soft_KHW.max(0), best_HW)
            certain_HW = mask_HW != 255
            winner_HW = np.array(note["classes"])[soft_KHW.argmax(0)]
            # Where two maps round to the same number, either may be the winner.
            clear_HW = certain_HW & ((soft_KHW == best_HW).sum(0) == 1)
            np.testing.assert_array_equal(winner_HW[clear_HW], mask_HW[clear_HW])
            assert (best_HW[~certain_HW] <= round(255 * 0.98)).all()
            row = rows[key]
            assert row["void_share"] == pytest.approx((~certain_HW).mean(), abs=1e-6)
            assert row["confidence"] == pytest.approx(best_HW.mean() / 255, abs=0.002)  # rounded to 8 bits
            assert row["empty"] == [index for index in raw.labels if index not in mask_HW]
            unary_HW = np.array(note["classes"])[scores.score_KHW.argmax(0)]
            before_void_HW = mask_of(probability_KHW, note["classes"])
            assert row["agreement_seed"] == pytest.approx((unary_HW == before_void_HW).mean(), abs=1e-6)
            seen, num_void = seen + 1, num_void + int((~certain_HW).sum())
    assert seen == len(rows) == 10
    assert num_void > 10  # or nothing was said of void


def test_labels_with_extra_maps_serve_those_who_do_not_ask_and_others_are_made_anew(shards, tmp_path):
    with_maps = replace(SETTINGS, soft=True, confidence=True)
    _run(shards, tmp_path / "a", settings=with_maps)
    made = label_bytes(tmp_path / "a")
    assert _run(shards, tmp_path / "a").images_now == 0
    assert label_bytes(tmp_path / "a") == made
    _run(shards, tmp_path / "b")
    assert _run(shards, tmp_path / "b", settings=replace(SETTINGS, soft=True)).images_now == 10


def test_new_content_replaces_labels_and_foreign_folders_are_left_alone(shards, tmp_path):
    output = tmp_path / "labels"
    _run(shards, output, limit=4)
    assert _run(shards, output, limit=4, hash="two").images_now == 4
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds no dfa labels"):
        _run(shards, foreign)
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


def test_changed_cut_and_missing_image_shards_are_named_and_the_others_are_labelled(shards, tmp_path):
    output = tmp_path / "labels"
    first, second, third = (Path(shards.path(entry.name)) for entry in shards.shards)
    keep = {path: path.read_bytes() for path in (first, second, third)}
    content = bytearray(keep[second])
    content[600] ^= 1
    second.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"1 of 3 shards have no labels.*shard-000001\.tar has changed"):
        _run(shards, output)
    assert sorted(path.name for path in output.glob("shard-*.json")) == ["shard-000000.json", "shard-000002.json"]
    second.unlink()
    with pytest.raises(ValueError, match=r"1 of 1 shards.*shard-000001\.tar"):
        _run(shards, output)
    second.write_bytes(keep[second][:1500])
    with pytest.raises(ValueError, match=r"shard-000001\.tar cannot be read after"):
        _run(shards, output)
    second.write_bytes(keep[second])
    assert _run(shards, output).images_now == shards.shards[1].num_samples


@pytest.mark.usefixtures("ray_session")
def test_a_picture_that_vanishes_costs_its_shard_alone(tmp_path):
    for number in range(6):
        Image.new("RGB", (16, 12), (40 * number, 9, 200)).save(tmp_path / f"{number}.png")
    listing = list_images(str(tmp_path), class_names=CLASSES, images_per_shard=2, max_pixels=10**6)
    part = replace(colour_pass(load_index, tmp_path / "labels"), images=ListedImages(listing))
    (tmp_path / "3.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 shards have no labels, the others are done: .*3\.png cannot be read"):
        factory.run(colour_plan(part))
    made = sorted(path.name for path in (tmp_path / "labels").glob("shard-*.tar"))
    assert made == ["shard-000000.tar", "shard-000002.tar"]


def test_a_scorer_that_cannot_be_made_ends_the_job_with_its_own_words(shards, tmp_path):
    def make():
        raise ValueError("the checkpoint has other classes")

    plan = colour_plan(colour_pass(shards, tmp_path / "new"), make=make)
    with pytest.raises(ValueError, match=r"^the checkpoint has other classes$"):
        factory.run(plan, LocalPool())


@pytest.mark.clusters
def test_an_error_of_the_input_is_told_once_and_not_again_by_each_task_behind_it(shards, tmp_path):
    code = (
        "import gc, time; from tests.label.colours import *; from dfa.train.loop import start_ray\n"
        "def make(): raise ValueError('the checkpoint has other classes')\n"
        "start_ray(num_cpus=1)\n"
        f"each = colour_pass(load_index({shards.root!r}), {str(tmp_path / 'new')!r})\n"
        "try: factory.run(colour_plan(each, make=make, batch_images=1, crf_images=1))\n"
        "except ValueError as error: print(error)\n"
        "gc.collect(); time.sleep(1)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "the checkpoint has other classes\n"  # its own words, without Ray's
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_said_and_earlier_shards_are_intact(shards, tmp_path):
    """A file size limit of the process stands for the disk: the system refuses the write itself."""
    output = tmp_path / "labels"
    _run(shards, output, limit=4)
    before = label_bytes(output)["shard-000000.tar"]
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 4, old[1]))
        with pytest.raises(ValueError, match=r"shard-00000\d\.tar cannot be written.*too large.*stay as they are"):
            _run(shards, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert label_bytes(output)["shard-000000.tar"] == before
    assert not list(output.glob(".*partial"))
    assert _run(shards, output).report.num_samples == 10


def test_samples_without_label_or_pixels_are_rejected_with_their_reason(shards, tmp_path):
    entry = shards.shards[0]
    path = Path(shards.path(entry.name))
    # The first image's pixels, from its compressed data on; the index is told, as if it had been sharded so.
    content = bytearray(path.read_bytes())
    place = content.index(b"IDAT")
    content[place + 20 : place + 40] = bytes(20)
    path.write_bytes(bytes(content))
    document = json.loads(Path(shards.root, "index.json").read_text())
    document["shards"][0]["sha256"] = hashlib.sha256(bytes(content)).hexdigest()
    Path(shards.root, "index.json").write_text(json.dumps(document))
    settings = replace(SETTINGS, skip_unlabelled=True)
    done = _run(load_index(shards.root), tmp_path / "labels", settings=settings)
    report = done.report
    reasons = {reject.key: reject.reason for reject in report.rejects}
    assert sorted(reasons) == ["k0", "k4"]
    assert reasons["k4"].startswith("no image-level label")
    assert report.num_samples == done.images_now == 8


@pytest.mark.runs
@pytest.mark.usefixtures("ray_session")
def test_images_and_labels_may_lie_in_an_object_store_behind_a_bad_line(tmp_path):
    sizes = [[(12, 16), (16, 12), (13, 17)][n % 3] for n in range(10)]
    local = write_images(tmp_path, sizes=sizes, samples_per_shard=4)
    _run(local, tmp_path / "labels")
    with object_store() as port:
        way = DisturbedWay(port)
        remote = write_images(tmp_path, sizes=sizes, samples_per_shard=4, root=address(way.port, "images"))
        assert [shard.sha256 for shard in remote.shards] == [shard.sha256 for shard in local.shards]
        way.cut_after, way.cuts = 3000, 2
        output = address(way.port, "made/labels")
        report = _run_on_ray(remote, output).report
        assert way.cuts == 0
        assert report.num_samples == 10
        expected = label_bytes(tmp_path / "labels")
        # The plan's hash holds no address, so even that is the same.
        assert {name: storage.read_bytes(storage.join(output, name)) for name in expected} == expected
        assert _run(remote, output).images_now == 0
        changed = storage.join(remote.root, "shard-000001.tar")
        content = bytearray(storage.read_bytes(changed))
        content[600] ^= 1
        storage.write_atomic(changed, lambda file: file.write(bytes(content)))
        with pytest.raises(ValueError, match=r"1 of 3 shards.*shard-000001\.tar.*has changed"):
            _run(remote, address(way.port, "again"))


def _kill_once(title: str, killed: list[int]) -> None:
    """Kill the first process of Ray that works on `title`."""
    deadline = time.monotonic() + 60
    while not killed and time.monotonic() < deadline:
        for process in psutil.process_iter(["pid", "cmdline"]):
            if title in " ".join(process.info["cmdline"] or ()):
                os.kill(process.info["pid"], signal.SIGKILL)
                killed.append(process.info["pid"])
                return
        time.sleep(0.002)


@pytest.mark.faults
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("title", ["ray::_ScorerActor.score", "ray::_finish_piece"])
def test_a_killed_worker_costs_its_piece_and_no_byte(title, tmp_path, caplog):
    index = write_images(tmp_path, sizes=[(200, 160), (160, 200)] * 12, samples_per_shard=8)
    factory.run(colour_plan(colour_pass(index, tmp_path / "whole"), make=_slow_scorers))
    killed: list[int] = []
    killer = threading.Thread(target=_kill_once, args=(title, killed), daemon=True)
    killer.start()
    result = factory.run(colour_plan(colour_pass(index, tmp_path / "killed"), make=_slow_scorers))["colours"]
    killer.join()
    assert killed
    told = [record.getMessage() for record in caplog.records if "is done again after" in record.getMessage()]
    assert told or title == "ray::_finish_piece"  # a task of its own is started again by Ray itself
    assert not [line for line in told if "ray::" in line]
    assert result.report.num_samples == 24
    assert label_bytes(tmp_path / "killed") == label_bytes(tmp_path / "whole")


def _slow_scorers():
    def scores(images, labels):
        time.sleep(0.2)  # long enough to be caught in the act
        return colour_scores(images, labels)

    return make_scorers() | {"colour": scores}


@pytest.mark.usefixtures("ray_session")
def test_what_no_node_has_is_refused_before_anything_waits_for_ever(shards, tmp_path):
    with pytest.raises(ValueError, match=r"0\.25 of a GPU.*0 GPUs free"):
        factory.run(colour_plan(colour_pass(shards, tmp_path / "a"), share=Share(use_gpu=True, scorer_gpus=0.25)))
    with pytest.raises(ValueError, match="resource 'crf'"):
        factory.run(colour_plan(colour_pass(shards, tmp_path / "b"), share=Share(crf_resource="crf")))
    with pytest.raises(ValueError, match=r"label\.scorer_cpus.*do not fit|label\.scorer_cpus is 3, the largest node"):
        factory.run(colour_plan(colour_pass(shards, tmp_path / "c"), share=Share(num_scorers=1, scorer_cpus=3.0)))
