"""The factory on Ray with a scorer that needs no model: restarts, order, rejects, damage."""

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfa.data.classes import voc_palette
from dfa.data.samples import MaskFile, Sample
from dfa.data.shards import SampleRow, load_index, read_shard
from dfa.data.transforms import decode_mask, encode_mask
from dfa.data.writer import finish, plan_shards, write_plan, write_shard
from dfa.label import factory
from dfa.label.crf import PRESETS
from dfa.label.output import export_pngs
from dfa.label.scoring import ImageScores, LabelSettings, label_image

CLASSES = ("red", "green", "blue")
SETTINGS = LabelSettings(3, PRESETS["deeplab"], 1.0, 0.0, (0.2, 0.5))


def _colour_scores(image_B3HW, labels):
    """A class's score is its colour channel: a pure function of the image."""
    channel_B3HW = image_B3HW.float() / 255
    return [
        ImageScores(
            torch.cat([torch.full_like(one[:1], 0.5), *(one[index - 1 : index] for index in present)]).numpy(),
            (0, *present),
        )
        for one, present in zip(channel_B3HW, labels, strict=True)
    ]


def _plan(label_pass):
    def make():
        return {"colour": _colour_scores}

    return factory.FactoryPlan(make, (label_pass,), use_gpu=False, batch_images=16, batch_pixels=600)


@pytest.fixture
def shards(tmp_path):
    """Ten images of two sizes in three shards."""
    rng, samples = np.random.default_rng(0), []
    for number in range(10):
        height, width = (12, 16) if number % 3 else (16, 12)
        image, mask = tmp_path / f"i{number}.png", tmp_path / f"m{number}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(image)
        mask.write_bytes(encode_mask(rng.choice(np.array([0, 1, 3, 255], np.uint8), (height, width)), voc_palette()))
        labels = () if number == 4 else (1, 3) if number % 2 else (2,)
        samples.append(Sample(f"k{number}", str(image), labels, MaskFile(str(mask))))
    plan = plan_shards(samples, class_names=CLASSES, seed=0, shuffle=False, samples_per_shard=4, max_pixels=10_000)
    root = str(tmp_path / "shards")
    write_plan(root, plan)
    for item in plan.items:
        write_shard(root, item)
    return finish(root, plan, max_reject_share=0)


def _pass(index, output, limit=0, hash="one"):
    return factory.LabelPass("colours", "colour", index, str(output), SETTINGS, hash, 10_000, limit)


def _bytes(folder: Path):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("ray_session")
def test_a_restart_labels_what_is_missing_to_the_same_bytes(shards, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    first = factory.run(_plan(_pass(shards, whole)))["colours"]
    assert (first.images_now, first.report.num_samples) == (10, 10)
    again = factory.run(_plan(_pass(shards, whole)))["colours"]
    assert again.images_now == 0
    assert again.report.tally.mask_CC.equal(first.report.tally.mask_CC)
    shutil.copytree(whole, broken)
    # As if killed: one marker never written, one shard cut short, no index, an attempt left behind.
    (broken / "shard-000001.json").unlink()
    (broken / "shard-000002.tar").write_bytes((broken / "shard-000002.tar").read_bytes()[:-1024])
    (broken / "index.json").unlink()
    (broken / ".shard-000001.tar.0.partial").write_bytes(b"half")
    mended = factory.run(_plan(_pass(shards, broken)))["colours"]
    assert mended.images_now == sum(one.num_samples for one in shards.shards[1:])
    assert _bytes(broken) == _bytes(whole)
    assert mended.report.tally.sweep_TCC.equal(first.report.tally.sweep_TCC)


@pytest.mark.usefixtures("ray_session")
def test_labels_join_the_images_by_key_and_equal_one_by_one_labelling(shards, tmp_path):
    report = factory.run(_plan(_pass(shards, tmp_path / "labels")))["colours"].report
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    for entry in shards.shards:
        images = list(read_shard(shards.path(entry.name)))
        labels = list(read_shard(f"{report.root}/{entry.name}"))
        assert [one.key for one in labels] == [one.key for one in images]
        assert [one.labels for one in labels] == [one.labels for one in images]
        for image, label in zip(images, labels, strict=True):
            pixels_HW3 = np.array(Image.open(io.BytesIO(image.image)))
            (scores,) = _colour_scores(torch.from_numpy(pixels_HW3).permute(2, 0, 1)[None], [image.labels])
            expected = label_image(pixels_HW3, scores, decode_mask(image.mask, max_pixels=10_000), SETTINGS)
            np.testing.assert_array_equal(decode_mask(label.image, max_pixels=10_000), expected.mask_HW)
            confusion += expected.tally.mask_CC
    assert report.tally.mask_CC.equal(confusion)
    assert export_pngs(report.root, str(tmp_path / "pngs")) == 10
    assert Image.open(tmp_path / "pngs/k4.png").getextrema() == (0, 0)  # an image without labels is background
    limited = factory.run(_plan(_pass(shards, tmp_path / "few", limit=5)))["colours"].report
    assert limited.num_samples == 5


@pytest.mark.usefixtures("ray_session")
def test_new_content_replaces_labels_and_errors_name_what_is_wrong(shards, tmp_path):
    output = tmp_path / "labels"
    factory.run(_plan(_pass(shards, output, limit=4)))
    renewed = factory.run(_plan(_pass(shards, output, limit=4, hash="two")))["colours"]
    assert renewed.images_now == 4
    shard = Path(shards.path("shard-000001.tar"))
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"shard-000001\.tar has changed"):
        factory.run(_plan(_pass(shards, output)))
    assert (output / "shard-000000.json").exists()  # earlier shards are intact
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds no dfa labels"):
        factory.run(_plan(_pass(shards, foreign)))

    def make():
        raise ValueError("the checkpoint has other classes")

    wrong = factory.FactoryPlan(make, (_pass(shards, tmp_path / "new", limit=2),), False, 3, 1000)
    with pytest.raises(ValueError, match=r"^the checkpoint has other classes$"):
        factory.run(wrong)


@pytest.mark.usefixtures("ray_session")
def test_a_sample_that_does_not_decode_is_rejected_with_its_reason(shards, tmp_path):
    entry = load_index(shards.root).shards[0]
    path = Path(shards.path(entry.name))
    # The first image's pixels, from its compressed data on; the index is told, as if it had been sharded so.
    content = bytearray(path.read_bytes())
    place = content.index(b"IDAT")
    content[place + 20 : place + 40] = bytes(20)
    path.write_bytes(bytes(content))
    document = json.loads(Path(shards.root, "index.json").read_text())
    document["shards"][0]["sha256"] = hashlib.sha256(bytes(content)).hexdigest()
    Path(shards.root, "index.json").write_text(json.dumps(document))
    report = factory.run(_plan(_pass(load_index(shards.root), tmp_path / "labels")))["colours"].report
    assert [reject.key for reject in report.rejects] == ["k0"]
    assert report.num_samples == 9


def test_chunks_hold_one_size_and_stay_within_both_bounds():
    rows = [SampleRow(f"k{n}", "s", n, (), 10 if n % 3 else 20, 10, True) for n in range(11)]
    chunks = list(factory.chunks_of(rows, batch_images=3, batch_pixels=400))
    assert sorted(row.row for chunk in chunks for row in chunk) == list(range(11))
    for chunk in chunks:
        assert len({(row.width, row.height) for row in chunk}) == 1
        assert len(chunk) <= (3 if chunk[0].width == 10 else 2)


@pytest.mark.parametrize(
    ("num_cpus", "num_gpus", "use_gpu"), [(2, 0, False), (1, 0, False), (0.5, 0, False), (7, 8, True)]
)
def test_scorers_and_crf_tasks_fit_beside_each_other(num_cpus, num_gpus, use_gpu):
    slots = factory.derive_slots(num_cpus=num_cpus, num_gpus=num_gpus, use_gpu=use_gpu)
    left = num_cpus - slots.num_scorers * slots.scorer_cpus
    assert left >= slots.crf_cpus > 0
    assert left // slots.crf_cpus >= max(1, int(num_cpus))
    assert slots.num_scorers * slots.scorer_gpus <= num_gpus


def test_no_free_cpu_is_said():
    with pytest.raises(ValueError, match=r"0\.05 CPUs"):
        factory.derive_slots(num_cpus=0.05, num_gpus=0, use_gpu=False)
