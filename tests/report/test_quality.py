"""Quality of labels without ground truth: numbers against slow loops, and the page that a person looks at."""

import base64
import io
import json
import re
import tracemalloc
from dataclasses import replace
from html import unescape

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from dfa.data import storage
from dfa.data.samples import Sample
from dfa.data.shards import load_index
from dfa.label.finished import read_label_rows
from dfa.report.figures import heat_overlay, mask_overlay
from dfa.report.quality import class_statistics, worst_samples, write_quality
from tests.label.folder import NAMES, SCHEMA, Label, grey_png, write_images, write_labels

RANDOM = np.random.default_rng(0)
SIZES = {"b": (40, 30), "d": (16, 16), "a": (30, 40), "c": (50, 20), "e": (20, 20)}


def random_mask(height, width, values=(0, 1, 2, 255)):
    return RANDOM.choice(np.array(values, np.uint8), (height, width))


def label(key, **changes):
    """Every label has class 2 or 3 among others; class 3 never gets a pixel."""
    labels = (1, 3) if key in "bd" else (2,)
    confidence = {"b": 0.5, "a": 0.25, "d": 0.25, "c": 0.75, "e": 1.0}[key]
    certain = grey_png(np.full(SIZES[key], round(255 * confidence), np.uint8))
    made = Label(key, random_mask(*SIZES[key]), labels, confidence, members=(("confidence.png", certain),))
    return replace(made, **changes)


def labelled(tmp_path, labels=None, names=NAMES):
    """Image shards of two samples each, and their labels; returns (address of the labels, index of the images)."""
    labels = [label(key) for key in SIZES] if labels is None else labels
    (tmp_path / "photos").mkdir()
    samples = []
    for each in labels:
        height, width = SIZES.get(each.key, each.mask_HW.shape)
        path = tmp_path / "photos" / f"{each.key}.png"
        Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        samples.append(Sample(each.key, str(path), each.labels))
    index = write_images(tmp_path / "images", samples, names=names, per_shard=2)
    rows = iter(labels)
    shards = [[replace(next(rows), row=row) for row in range(shard.num_samples)] for shard in index.shards]
    return write_labels(tmp_path / "labels", shards, names, index.plan_hash), index


def pictures(page):
    """Of each article of the page: heading, decoded pictures, captions, legend."""
    found = []
    for article in re.findall(r"<article.*?</article>", page, re.DOTALL):
        images = [Image.open(io.BytesIO(base64.b64decode(x))) for x in re.findall(r"base64,([^\"]+)", article)]
        heading = unescape(re.search(r"<h3>(.*?)</h3>", article)[1])
        legend = re.findall(r"</i>([^<]*)</li>", article)
        found.append((heading, images, re.findall(r"<figcaption>(.*?)<", article), legend))
    return found


def test_the_worst_samples_come_first_and_ties_go_by_key(tmp_path):
    root, _ = labelled(tmp_path)
    assert [row.key for row in worst_samples(root, count=10, by="confidence")] == ["a", "d", "b", "c", "e"]
    ordered = sorted(read_label_rows(root), key=lambda row: (row.confidence, row.key))
    assert worst_samples(root, count=3, by="confidence") == ordered[:3]
    assert worst_samples(root, count=0, by="confidence") == []


def test_agreement_is_that_with_the_model_where_it_looked(tmp_path):
    seed, model = [0.1, 0.2, 0.3, 0.4, 0.5], [0.9, None, 0.25, 0.25, None]
    labels = [
        label(key, agreement_seed=a, agreement_model=0.0 if b else None, agreement_seed_model=b)
        for key, a, b in zip(SIZES, seed, model, strict=True)
    ]
    root, _ = labelled(tmp_path, labels)
    assert [row.key for row in worst_samples(root, count=4, by="agreement")] == ["d", "a", "c", "e"]


def test_half_of_the_samples_disagree_and_half_are_uncertain_and_all_are_linked(tmp_path):
    agreement = {"b": 0.9, "d": 0.2, "a": 0.3, "c": 0.1, "e": 0.4}
    root, index = labelled(tmp_path, [label(key, agreement_seed=agreement[key]) for key in SIZES])
    write_quality(root, index, str(tmp_path / "quality"), count=4, title="x")
    page = (tmp_path / "quality" / "quality.html").read_text()
    # c and d by agreement, then a and b by confidence: d, which is less confident than b, is there already.
    assert [heading[0] for heading, *_ in pictures(page)] == ["c", "d", "a", "b"]
    assert re.findall(r'<article id="(.*?)">', page) == [f"sample-{key}" for key in "cdab"]
    rows = re.findall(r'<td><a href="#(.*?)">(.*?)</a></td><td>(.*?)</td><td class="number">(.*?)</td>', page)
    reasons = ["least agreement"] * 2 + ["least confident"] * 2
    assert rows == [
        (f"sample-{k}", k, why, f"{100 * agreement[k]:.1f}") for k, why in zip("cdab", reasons, strict=True)
    ]
    numbers = json.loads((tmp_path / "quality" / "quality.json").read_text())
    assert [(row["key"], row["reason"]) for row in numbers["worst"]] == list(zip("cdab", reasons, strict=True))


def test_the_page_leads_with_agreement_and_says_what_made_the_labels(tmp_path):
    root, index = labelled(tmp_path)
    facts = {"checkpoint": "step 7", "CRF": "preset wide"}
    write_quality(root, index, str(tmp_path / "quality"), count=0, title="x", unary="model", facts=facts)
    page = (tmp_path / "quality" / "quality.html").read_text()
    cards = re.findall(r'<div class="card"><span>(.*?)</span>', page)
    assert cards == ["model and CRF agree, %", "empty labels, %", "void, %", "confidence, %"]
    told = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert told["checkpoint"] == "step 7" and told["CRF"] == "preset wide" and told["classes"] == "3: cat, dog, hot dog"
    assert json.loads((tmp_path / "quality" / "quality.json").read_text())["facts"] == facts


def test_the_models_own_mask_is_shown_where_it_is_kept(tmp_path):
    own = np.full(SIZES["a"], 3, np.uint8)
    labels = [label(key, mask_HW=np.full(SIZES[key], 1, np.uint8)) for key in SIZES]
    labels[2] = replace(labels[2], members=(*labels[2].members, ("model.png", grey_png(own))))
    root, index = labelled(tmp_path, labels)
    write_quality(root, index, str(tmp_path / "quality"), count=5, title="x")
    for heading, images, captions, legend in pictures((tmp_path / "quality" / "quality.html").read_text()):
        if heading[0] == "a":
            assert captions == ["image", "pseudo-label", "prediction", "uncertainty"] and legend == ["cat", "hot dog"]
            wanted = mask_overlay(np.asarray(images[0]), np.full(np.asarray(images[0]).shape[:2], 3, np.uint8))
            # JPEG at quality 80; another class is 20 grey levels away or more
            assert np.abs(np.asarray(images[2]).mean((0, 1)) - wanted.mean((0, 1))).max() < 8
        else:
            assert captions == ["image", "pseudo-label", "uncertainty"]


def test_the_worst_of_many_samples_are_found_without_holding_them_all(tmp_path):
    mask, order = np.zeros((1, 1), np.uint8), RANDOM.permutation(16_000)
    rows = [Label(f"k{number:05d}", mask, (1,), number / 16_000) for number in order.tolist()]
    root = write_labels(tmp_path / "labels", [[]])
    table = pyarrow.Table.from_pylist([row.row_of_table("shard-000000.tar") for row in rows], schema=SCHEMA)
    pyarrow.parquet.write_table(table, tmp_path / "labels" / "samples.parquet")
    tracemalloc.start()
    keep = list(read_label_rows(root))
    everything = tracemalloc.get_traced_memory()[1]
    assert len(keep) == 16_000
    del keep
    tracemalloc.reset_peak()
    worst = worst_samples(root, count=5, by="confidence")
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.key for row in worst] == [f"k{number:05d}" for number in range(5)]
    assert used < everything / 2, f"{used} bytes, all rows take {everything}"


def test_statistics_of_classes_are_those_of_the_masks(tmp_path):
    labels = [label(key) for key in SIZES]
    root, _ = labelled(tmp_path, labels)
    found, num_pixels = class_statistics(root), sum(each.mask_HW.size for each in labels)
    for number, each in enumerate(found.classes, start=1):
        carriers = [one for one in labels if number in one.labels]
        empty = sum(not (one.mask_HW == number).any() for one in carriers)
        assert (each.name, each.num_images, each.num_empty) == (NAMES[number - 1], len(carriers), empty)
        assert each.empty_rate == empty / len(carriers)
        assert each.pixel_share == sum(int((one.mask_HW == number).sum()) for one in labels) / num_pixels
        assert each.confidence == sum(one.confidence for one in carriers) / len(carriers)
    assert [each.empty_rate for each in found.classes] == [0, 0, 1]
    assert found.empty_rate == 2 / 7  # two of b's, a's, d's, c's and e's seven labels
    assert found.void_share == sum(int((one.mask_HW == 255).sum()) for one in labels) / num_pixels
    total = found.void_share + found.background_share + sum(each.pixel_share for each in found.classes)
    assert total == pytest.approx(1, abs=1e-12)
    assert (found.num_images, found.num_rejects, found.reject_reasons) == (5, 2, {"no label": 2})


def test_agreement_is_the_mean_over_images_that_the_model_looked_at(tmp_path):
    keys, seed = list(SIZES), [0.5, 0.25, 1.0, 0.0, 0.125]
    model = [0.5, None, None, 0.25, None]
    labels = [
        label(key, agreement_seed=a, agreement_model=b, agreement_seed_model=b)
        for key, a, b in zip(keys, seed, model, strict=True)
    ]
    found = class_statistics(labelled(tmp_path, labels)[0])
    assert (found.agreement_seed, found.agreement_model, found.agreement_seed_model) == (0.375, 0.375, 0.375)
    assert found.confidence == 0.55


def test_what_nothing_is_known_of_has_no_mean(tmp_path):
    found = class_statistics(write_labels(tmp_path / "labels", [[]]))
    assert found.confidence is found.agreement_seed is found.agreement_model is found.empty_rate is None
    assert all(each.empty_rate is each.confidence is None and each.pixel_share == 0 for each in found.classes)
    assert found.num_images == found.void_share == 0


def test_labels_beyond_the_classes_and_missing_rows_are_refused(tmp_path):
    root = write_labels(tmp_path / "labels", [[label("a", labels=(2, 4))]])
    with pytest.raises(ValueError, match=r"key 'a' has labels \[4, 4\]; the classes are 1\.\.3"):
        class_statistics(root)
    root = write_labels(tmp_path / "other", [[label("a")]])
    document = json.loads((tmp_path / "other" / "index.json").read_text()) | {"num_samples": 2}
    (tmp_path / "other" / "index.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"1 rows, the index says 2"):
        class_statistics(root)


def test_the_page_shows_the_worst_samples_with_their_maps(tmp_path):
    root, index = labelled(tmp_path)
    address = write_quality(root, index, str(tmp_path / "deep" / "quality"), count=4, title="Labels of mine")
    page = (tmp_path / "deep" / "quality" / "quality.html").read_text()
    assert address == str(tmp_path / "deep" / "quality" / "quality.html") and "<h1>Labels of mine</h1>" in page
    shown = pictures(page)
    # All agree alike, so the first two go by key.
    assert [heading for heading, *_ in shown] == [
        "a · CRF agrees 75.0 % · confidence 25.0 % · dog",
        "b · CRF agrees 75.0 % · confidence 50.0 % · cat, hot dog · empty: hot dog",
        "d · CRF agrees 75.0 % · confidence 25.0 % · cat, hot dog · empty: hot dog",
        "c · CRF agrees 75.0 % · confidence 75.0 % · dog",
    ]
    for heading, images, captions, legend in shown:
        height, width = SIZES[heading[0]]
        assert captions == ["image", "pseudo-label", "uncertainty"] and legend == ["cat", "dog", "void"]
        for image in images:
            assert abs(image.width / image.height - width / height) < 0.02 and image.format == "JPEG"
    assert "Doubtful samples" in page and not re.search(r"https?://|<script", page)


def test_panels_are_the_mask_and_the_uncertainty_of_their_own_sample(tmp_path):
    flat = {key: np.full(SIZES[key], value, np.uint8) for key, value in zip(SIZES, (1, 2, 0, 255, 1), strict=True)}
    labels = [label(key, mask_HW=mask) for key, mask in flat.items()]
    root, index = labelled(tmp_path, labels)
    write_quality(root, index, str(tmp_path / "quality"), count=5, title="x")
    for heading, (image, overlay, heat), _, _ in pictures((tmp_path / "quality" / "quality.html").read_text()):
        value = int(flat[heading[0]][0, 0])
        own = np.asarray(image)
        uncertainty = np.full(own.shape[:2], 1 - label(heading[0]).confidence, np.float32)
        expected = (
            mask_overlay(own, np.full(own.shape[:2], value, np.uint8)),
            heat_overlay(own, uncertainty, colours="viridis"),
        )
        for drawn, wanted in zip((overlay, heat), expected, strict=True):
            # Both went through JPEG at quality 80; a wrong class or share is 20 grey levels away or more.
            difference = np.asarray(drawn).mean((0, 1)) - wanted.mean((0, 1))
            assert np.abs(difference).max() < 8, heading


def test_the_numbers_file_holds_all_of_it(tmp_path):
    root, index = labelled(tmp_path)
    write_quality(root, index, str(tmp_path / "quality"), count=2, title="x")
    found, statistics = json.loads((tmp_path / "quality" / "quality.json").read_text()), class_statistics(root)
    assert found["kind"] == "dfa-label-quality" and found["agreement_model"] is None
    for name in ("num_images", "void_share", "empty_rate", "confidence", "agreement_seed", "reject_reasons"):
        assert found[name] == getattr(statistics, name)
    assert [each["empty_rate"] for each in found["classes"]] == [0, 0, 1]
    worst = [(each["key"], each["confidence"], each["labels"], each["empty"]) for each in found["worst"]]
    assert worst == [("a", 0.25, ["dog"], []), ("d", 0.25, ["cat", "hot dog"], ["hot dog"])]
    assert [each["reason"] for each in found["worst"]] == ["least agreement", "least confident"]


def test_the_same_labels_give_the_same_bytes(tmp_path):
    root, index = labelled(tmp_path)
    for name in ("one", "two"):
        write_quality(f"file://{root}", index, f"file://{tmp_path}/{name}", count=3, title="x")
    for name in ("quality.html", "quality.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == ["quality.html", "quality.json"]


def test_everything_may_lie_at_remote_addresses(tmp_path):
    local, index = labelled(tmp_path)
    root = "memory://quality/labels"
    for folder, target in ((local, root), (index.root, "memory://quality/images")):
        storage.make_folder(target)
        for name in storage.list_names(folder):
            data = storage.read_bytes(storage.join(folder, name))
            storage.write_atomic(storage.join(target, name), lambda file, data=data: file.write(data))
    write_quality(local, index, str(tmp_path / "quality"), count=5, title="x")
    remote = write_quality(root, load_index("memory://quality/images"), "memory://quality/page", count=5, title="x")
    assert remote == "memory://quality/page/quality.html"
    for name in ("quality.html", "quality.json"):
        assert storage.read_bytes(f"memory://quality/page/{name}") == (tmp_path / "quality" / name).read_bytes()


def test_what_a_model_says_is_shown_where_there_is_one(tmp_path):
    pages = []
    for name, agreement in (("none", None), ("some", 0.5)):
        (tmp_path / name).mkdir()
        labels = [label(key, agreement_model=agreement, agreement_seed_model=agreement) for key in SIZES]
        root, index = labelled(tmp_path / name, labels)
        write_quality(root, index, str(tmp_path / name / "quality"), count=0, title="x")
        pages.append((tmp_path / name / "quality" / "quality.html").read_text())
    for card in ("trained model and CRF agree", "CAM and trained model agree"):
        assert [page.count(card) for page in pages] == [0, 1]


def test_a_page_without_samples_or_confidence_maps_is_fine(tmp_path):
    root, index = labelled(tmp_path, [label(key, members=()) for key in SIZES])
    write_quality(root, index, str(tmp_path / "quality"), count=0, title="x")
    page = (tmp_path / "quality" / "quality.html").read_text()
    assert pictures(page) == [] and "Doubtful" not in page and "hot dog" in page
    write_quality(root, index, str(tmp_path / "quality"), count=1, title="x")
    ((_, _, captions, _),) = pictures((tmp_path / "quality" / "quality.html").read_text())
    assert captions == ["image", "pseudo-label"]


def test_the_classes_that_masks_miss_most_come_first(tmp_path):
    root, index = labelled(tmp_path)
    write_quality(root, index, str(tmp_path / "quality"), count=0, title="x")
    page = (tmp_path / "quality" / "quality.html").read_text()
    rows = re.findall(r"<tr><td>([^<]*)</td>", page)
    assert rows == ["hot dog", "cat", "dog", "no label"]


def test_names_are_escaped(tmp_path):
    names = ("<script>cat", "dog & co", "hot dog")
    root, index = labelled(tmp_path, names=names)
    write_quality(root, index, str(tmp_path / "quality"), count=5, title="<b>x")
    page = (tmp_path / "quality" / "quality.html").read_text()
    assert "<script" not in page and "<b>x" not in page and "&lt;script&gt;cat" in page and "dog &amp; co" in page


def test_a_narrow_picture_takes_no_page_of_its_own(tmp_path):
    tall = Label("tall", random_mask(900, 3), (1, 2), 0.1)
    root, index = labelled(tmp_path, [tall])
    write_quality(root, index, str(tmp_path / "quality"), count=1, title="x")
    ((_, images, _, _),) = pictures((tmp_path / "quality" / "quality.html").read_text())
    assert all(image.size == (1, 300) for image in images)


def test_labels_of_other_image_shards_are_refused(tmp_path):
    root, index = labelled(tmp_path)
    with pytest.raises(ValueError, match="labels other image shards"):
        write_quality(root, replace(index, plan_hash="other"), str(tmp_path / "quality"), count=1, title="x")
    assert not (tmp_path / "quality").exists()


def test_an_image_that_is_not_the_labels_own_is_named(tmp_path):
    root, index = labelled(tmp_path)
    swapped = write_labels(
        tmp_path / "swapped", [[label("a", row=0), label("b", row=1)], [label("d"), label("c", row=1)], [label("e")]]
    )
    with pytest.raises(ValueError, match=r"row 0 of .*shard-000000\.tar is 'b', which .* does not label"):
        write_quality(swapped, replace(index, plan_hash="p"), str(tmp_path / "quality"), count=1, title="x")
    bad = [label(key, mask_HW=random_mask(9, 9)) if key == "a" else label(key) for key in SIZES]
    (tmp_path / "bad").mkdir()
    root, index = labelled(tmp_path / "bad", bad)
    with pytest.raises(ValueError, match=r"shard-000001\.tar, key 'a' cannot be shown: image has 40 x 30"):
        write_quality(root, index, str(tmp_path / "quality"), count=1, title="x")
    assert not (tmp_path / "quality").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    root, index = labelled(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"cannot be written to .*/file/quality"):
        write_quality(root, index, str(tmp_path / "file" / "quality"), count=1, title="x")


def test_the_page_of_24_real_photographs_stays_small(sample_data, tmp_path):
    voc = sample_data / "voc_mini" / "VOCdevkit" / "VOC2012"
    names = tuple(f"class {number}" for number in range(1, 21))
    keys = (voc / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[:24]
    samples, labels = [], []
    for number, key in enumerate(keys):
        mask = np.asarray(Image.open(voc / "SegmentationClassAug" / f"{key}.png"))
        present = tuple(int(value) for value in np.unique(mask) if 0 < value < 255)
        samples.append(Sample(key, str(voc / "JPEGImages" / f"{key}.jpg"), present))
        certain = np.linspace(0, 255, mask.size).astype(np.uint8).reshape(mask.shape)
        members = (("confidence.png", grey_png(certain)),)
        labels.append(Label(key, mask, present, 1 - number / 100, row=number % 8, members=members))
    index = write_images(tmp_path / "images", samples, names=names, per_shard=8)
    shards = [labels[first : first + 8] for first in range(0, 24, 8)]
    root = write_labels(tmp_path / "labels", shards, names, index.plan_hash)
    address = write_quality(root, index, str(tmp_path / "quality"), count=24, title="VOC")
    page = (tmp_path / "quality" / "quality.html").read_text()
    # All agree alike: twelve by key, then the least confident of the others.
    first = sorted(keys)[:12]
    assert [heading.split()[0] for heading, *_ in pictures(page)] == [
        *first,
        *(k for k in keys[::-1] if k not in first),
    ]
    assert all(len(images) == 3 and images[0].width <= 280 for _, images, _, _ in pictures(page))
    assert len(page) < 3_000_000, f"{address} has {len(page) / 1e6:.1f} MB"
