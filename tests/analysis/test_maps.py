import os
import zipfile

import numpy as np
import pytest

from dfa.analysis.maps import MapLimits, find_maps, join_pairs, read_map
from dfa.label.blocks import write_block_labels
from tests.analysis.made import logits_of, prediction_of, truth_of, write_arrays, write_images, write_pngs

LIMITS = MapLimits(num_classes=3, max_pixels=1000)
KEYS = [f"trip_{number}" for number in range(9)]


def find(root, field="analyze.truth"):
    return find_maps(str(root), field=field, num_classes=3)


def everything(parts):
    """key -> (prediction, truth), read as a worker reads."""
    found = {}
    for part in parts:
        readers = [side.open(part.keys, LIMITS) for side in (part.prediction, part.truth)]
        found |= {key: tuple(read(key) for read in readers) for key in part.keys}
    return found


@pytest.fixture
def truths():
    return {key: truth_of(number) for number, key in enumerate(KEYS)}


@pytest.fixture
def predictions():
    return {key: prediction_of(number) for number, key in enumerate(KEYS)}


@pytest.mark.parametrize("form", ["pngs", "arrays", "mixed", "sharded truth", "sharded prediction"])
def test_pairs_are_joined_by_key_whatever_their_form(tmp_path, truths, predictions, form):
    sides = {
        "pngs": lambda: (write_pngs(tmp_path / "p", predictions), write_pngs(tmp_path / "t", truths)),
        "arrays": lambda: (write_arrays(tmp_path / "p", predictions), write_arrays(tmp_path / "t", truths)),
        "mixed": lambda: (write_arrays(tmp_path / "p", predictions, suffix=".npz"), write_pngs(tmp_path / "t", truths)),
        "sharded truth": lambda: (write_pngs(tmp_path / "p", predictions), write_images(tmp_path / "t", truths).root),
        "sharded prediction": lambda: (
            write_images(tmp_path / "p", predictions).root,
            write_pngs(tmp_path / "t", truths),
        ),
    }
    prediction, truth = map(find, sides[form]())
    parts = join_pairs(prediction, truth, pairs_per_part=2)
    assert max(len(part.keys) for part in parts) <= 2
    assert [part.name for part in parts] == [f"part-{number:06d}" for number in range(len(parts))]
    found = everything(parts)
    assert found.keys() == truths.keys()
    for key, (one, other) in found.items():
        np.testing.assert_array_equal(one, predictions[key])
        np.testing.assert_array_equal(other, truths[key])


def test_label_shards_meet_the_image_shards_they_were_made_for(tmp_path, truths):
    index = write_images(tmp_path / "images", truths)
    write_block_labels(index, str(tmp_path / "labels"), grid=1000, max_pixels=1000)
    parts = join_pairs(find(tmp_path / "labels"), find(tmp_path / "images"), pairs_per_part=100)
    assert len(parts) == len(index.shards) == 3
    for one, other in everything(parts).values():
        np.testing.assert_array_equal(one, other)
    other = write_images(tmp_path / "other", dict(list(truths.items())[:7]))
    with pytest.raises(ValueError, match=r"labels and .*other are of two shardings"):
        join_pairs(find(tmp_path / "labels"), find(other.root), pairs_per_part=100)


def test_folders_below_folders_have_keys_of_their_own(tmp_path):
    names = ("a/1", "b/1", "2")
    root = write_pngs(tmp_path / "p", {name: truth_of(0) for name in names})
    (tmp_path / "p/.hidden.png").write_bytes(b"")
    (tmp_path / "p/note.txt").write_text("")
    assert sorted(find(root).keys[""]) == ["2", "a_1", "b_1"]
    write_pngs(tmp_path / "p", {"a_1": truth_of(0)})
    with pytest.raises(
        ValueError, match=r"a/1.png and a_1.png have the same key|a_1.png and a/1.png have the same key"
    ):
        find(root)


def test_a_truth_without_a_prediction_stays_in_its_part_as_missing(tmp_path, truths, predictions):
    del predictions[KEYS[3]]
    truth = find(write_pngs(tmp_path / "t", truths))
    for form, write in (("files", write_pngs), ("shards", lambda path, maps: write_images(path, maps).root)):
        parts = join_pairs(find(write(tmp_path / form, predictions)), truth, pairs_per_part=50)
        assert sorted(key for part in parts for key in part.keys) == KEYS
        part = next(part for part in parts if KEYS[3] in part.keys)
        with pytest.raises(ValueError, match=rf"no such file|has no {KEYS[3]}"):
            part.prediction.open(part.keys, LIMITS)(KEYS[3])


def test_the_digest_of_a_part_changes_with_its_files_and_settings(tmp_path, truths, predictions):
    roots = write_pngs(tmp_path / "p", predictions), write_pngs(tmp_path / "t", truths)

    def digest(settings="a"):
        return join_pairs(*map(find, roots), pairs_per_part=50)[0].digest(settings)

    first = digest()
    assert digest() == first != digest("b")
    path = tmp_path / "p" / f"{KEYS[0]}.png"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    assert digest() != first


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", "<f2"])
def test_logits_are_read_as_numpy_wrote_them(tmp_path, kind, order):
    logits = np.asarray(logits_of(0), kind, order=order)
    np.save(tmp_path / "a.npy", logits)
    found = read_map(str(tmp_path / "a.npy"), LIMITS)
    np.testing.assert_array_equal(found, logits)
    assert found.dtype.isnative and found.flags.writeable


def test_labels_of_any_integer_type_are_read(tmp_path):
    for kind in (np.uint8, np.int32, np.uint16, np.int64):
        np.save(tmp_path / "a.npy", truth_of(0).astype(kind))
        found = read_map(str(tmp_path / "a.npy"), LIMITS)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, truth_of(0))


def array_file(tmp_path, array, **options):
    np.save(tmp_path / "a.npy", array, **options)
    return str(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 5, 6), np.float32), r"a.npy cannot be read: it is float32 \(4, 5, 6\); needed are integers"),
        (np.zeros((5, 6), np.float32), r"it is float32 \(5, 6\)"),
        (np.zeros((3, 5, 6), np.int32), r"it is int32 \(3, 5, 6\)"),
        (np.zeros((40, 50), np.uint8), r"it has 40 x 50 pixels, allowed are 1 to max_pixels=1000"),
        (np.zeros((0, 5), np.uint8), r"it has 0 x 5 pixels"),
        (np.full((5, 6), 256, np.int32), r"a.npy has labels from 256 to 256; allowed are 0 to 255"),
        (np.full((5, 6), -1, np.int8), r"a.npy has labels from -1 to -1"),
        (np.array([[object()]]), r"it is object \(1, 1\)"),
    ],
)
def test_arrays_that_are_no_maps_are_refused(tmp_path, array, message):
    with pytest.raises(ValueError, match=message):
        read_map(array_file(tmp_path, array), LIMITS)


def test_broken_arrays_are_refused_and_headers_allocate_nothing(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((20, 30), np.uint8))
    data = path.read_bytes()
    for content, message in (
        (data[:-10], r"a.npy cannot be read: it ends after 590 of 600 bytes"),
        (data.replace(b"(20, 30)", b"(999, 1)"), r"it ends after 600 of 999 bytes"),
        (data.replace(b"(20, 30)", b"(9999,9)"), r"it has 9999 x 9 pixels"),
        (b"nothing", r"a.npy cannot be read"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_map(str(path), LIMITS)
        with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.npy", content)
        with pytest.raises(ValueError, match=message.replace("a.npy", "b.npz")):
            read_map(str(tmp_path / "b.npz"), LIMITS)
    np.savez(tmp_path / "b.npz", a=truth_of(0), b=truth_of(0))
    with pytest.raises(ValueError, match=r"b.npz cannot be read: it holds 2 arrays, needed is one"):
        read_map(str(tmp_path / "b.npz"), LIMITS)
    (tmp_path / "b.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"b.npz cannot be read"):
        read_map(str(tmp_path / "b.npz"), LIMITS)


def test_what_cannot_be_compared_is_named(tmp_path, truths):
    with pytest.raises(ValueError, match=r"analyze.truth is empty"):
        find("")
    with pytest.raises(ValueError, match=r"analyze.truth .*nowhere is no folder"):
        find(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no .png, .npy, .npz"):
        find(tmp_path / "empty")
    index = write_images(tmp_path / "images", truths)
    with pytest.raises(ValueError, match=r"images is of 2 classes, data.classes names 20"):
        find_maps(index.root, field="analyze.truth", num_classes=21)
    bare = write_images(tmp_path / "bare", truths, with_masks=False)
    with pytest.raises(ValueError, match=r"bare holds images without masks"):
        find(bare.root)
    strange = write_pngs(tmp_path / "strange", {"elsewhere": truth_of(0)})
    with pytest.raises(ValueError, match=r"have no key in common: such as 'elsewhere' and 'trip_"):
        join_pairs(find(strange), find(index.root), pairs_per_part=5)
