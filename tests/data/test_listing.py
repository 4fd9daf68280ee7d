"""Folders of images as virtual shards."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfa.data.listing import list_images
from dfa.data.shards import BrokenShardError
from dfa.data.transforms import decode_rgb

NAMES = ("cat", "dog")
LIMIT = 100_000


def save(path, width=20, height=10, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    """Seven images of three depths among files that are none."""
    root = tmp_path / "photos"
    for number, name in enumerate(["b.jpg", "a/z.png", "a/b/c.JPEG", "a.png", "d e.jpg", "x/1.2.jpg", "é.png"]):
        save(root / name, width=20 + number, height=10 + 2 * number)
    for name in [".hidden.jpg", ".git/e.jpg", "a/notes.txt", "b.gif"]:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"no image")
    return root


def listed(root, **options):
    return list_images(str(root), **{"class_names": NAMES, "images_per_shard": 3, "max_pixels": LIMIT, **options})


def rows_of(listing, limit=0):
    return [row for _, rows in listing.samples(limit) for row in rows]


def test_all_images_are_listed_by_relative_path_in_shards_of_a_fixed_number(folder):
    expected = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and not any(p[0] == "." for p in path.parts[-2:])
    )
    found = listed(folder)
    assert [name for names in found.names for name in names] == expected
    assert (found.num_samples, found.class_names) == (7, NAMES)
    assert [entry.name for entry in found.shards] == [f"shard-00000{n}.tar" for n in range(3)]
    assert [entry.num_samples for entry in found.shards] == [3, 3, 1]
    assert found.shards[2].size_bytes == (folder / expected[6]).stat().st_size
    assert found.shards[0].class_histogram == (0, 0)


def test_rows_have_keys_sizes_and_places(folder):
    rows = rows_of(listed(folder))
    names = [name for part in listed(folder).names for name in part]
    for name, row in zip(names, rows, strict=True):
        with Image.open(folder / name) as image:
            assert (row.width, row.height) == image.size
        assert row.labels == ()
        assert not row.has_mask
    # A name in another script keeps little of itself, and gets a hash.
    assert [row.key.split("-")[0] for row in rows] == ["a", "a_b_c", "a_z", "b", "d_e", "x_1_2", "_"]
    assert [(row.shard[6:12], row.row) for row in rows] == [(f"00000{n // 3}", n % 3) for n in range(7)]


def test_the_size_comes_from_the_header_in_the_stored_frame(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    data = save(tmp_path / "turned.jpg", 40, 30, exif=exif).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    assert [(row.width, row.height) for row in rows_of(listed(tmp_path))] == [(40, 30)] * 2


def test_as_viewers_turn_them_images_have_the_turned_size_and_other_masks(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    data = save(tmp_path / "turned.jpg", 40, 30, exif=exif).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    stored, shown = (listed(tmp_path, apply_exif=apply_exif) for apply_exif in (False, True))
    assert [(row.width, row.height) for row in rows_of(shown)] == [(30, 40)] * 2
    cut, whole = shown.read(shown.shards[0].name, [0, 1])
    assert Image.open(io.BytesIO(whole.image)).size == (whole.width, whole.height) == (30, 40)
    assert cut.image == (tmp_path / "cut.jpg").read_bytes()  # decoding will say what it is
    assert shown.plan_hash != stored.plan_hash


def test_what_cannot_be_decoded_has_no_size_and_goes_to_the_reader_all_the_same(tmp_path):
    save(tmp_path / "a.png", 400, 300)
    (tmp_path / "b.jpg").write_bytes(b"")
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    Image.new("RGB", (9, 9)).save(tmp_path / "d.jpg", format="GIF")
    save(tmp_path / "e.png")
    found = listed(tmp_path, images_per_shard=9)
    assert [(row.width, row.height) for row in rows_of(found)] == [(0, 0)] * 4 + [(20, 10)]
    for raw in found.read("shard-000000.tar", range(4)):
        assert (raw.width, raw.height) == (0, 0)
        with pytest.raises(ValueError, match=r"pixels, more than|not a JPEG or PNG|header|the file is empty"):
            decode_rgb(raw.image, max_pixels=LIMIT)


def test_wanted_rows_are_read_as_they_lie_on_disk(folder):
    found = listed(folder)
    shard, names = found.shards[1].name, found.names[1]
    got = list(found.read(shard, [2, 0, 2]))
    assert [raw.row for raw in got] == [0, 2]
    for raw in got:
        assert raw.image == (folder / names[raw.row]).read_bytes()
        assert (raw.width, raw.height) == Image.open(io.BytesIO(raw.image)).size
        assert (raw.shard, raw.labels, raw.mask) == (shard, (), None)
    assert [raw.key for raw in got] == ["b", "x_1_2"]


@pytest.mark.parametrize("limit", [1, 3, 4, 7, 100])
def test_a_limit_takes_the_first_images(folder, limit):
    parts = list(listed(folder).samples(limit))
    assert [row for _, rows in parts for row in rows] == rows_of(listed(folder))[:limit]
    assert all(rows for _, rows in parts)


def test_the_fingerprint_tells_a_changed_file_in_its_shard_alone(folder):
    found = listed(folder)
    assert [found.fingerprint(entry.name) for entry in found.shards] == [entry.sha256 for entry in found.shards]
    touched = folder / found.names[1][0]
    os.utime(touched, ns=(0, touched.stat().st_mtime_ns + 1))
    same = [found.fingerprint(entry.name) == entry.sha256 for entry in found.shards]
    assert same == [True, False, True]
    grown = folder / found.names[2][0]
    before = grown.stat()
    grown.write_bytes(grown.read_bytes() + b".")
    os.utime(grown, ns=(0, before.st_mtime_ns))
    assert found.fingerprint(found.shards[2].name) != found.shards[2].sha256
    grown.unlink()
    with pytest.raises(ValueError, match=f"{grown} cannot be read: No such file"):
        found.fingerprint(found.shards[2].name)


def test_the_plan_hash_is_of_names_and_sizes_wherever_the_folder_lies(folder, tmp_path):
    first = listed(folder)
    moved = folder.rename(tmp_path / "elsewhere")
    os.utime(moved / "b.jpg", ns=(0, 1))
    assert listed(moved).plan_hash == first.plan_hash
    (moved / "b.jpg").rename(moved / "bb.jpg")
    assert listed(moved).plan_hash != first.plan_hash


def test_an_image_that_joins_at_the_end_leaves_the_shards_before_it(folder):
    before = listed(folder)
    save(folder / "ö1.jpg")
    after = listed(folder)
    assert after.shards[:2] == before.shards[:2]
    assert after.shards[2] != before.shards[2]
    assert after.plan_hash != before.plan_hash


def test_the_part_that_travels_is_small_and_reads_the_same(tmp_path):
    data = save(tmp_path / "seed.png", 2, 2).read_bytes()
    for number in range(2000):
        (tmp_path / f"{number:05d}.png").write_bytes(data)
    whole = listed(tmp_path, images_per_shard=100)
    shard = whole.shards[7].name
    packed = pickle.dumps(whole.only(shard))
    assert len(packed) < 3_000
    part = pickle.loads(packed)
    assert part.num_samples == 100
    assert part.fingerprint(shard) == whole.shards[7].sha256
    assert list(part.read(shard, [3])) == list(whole.read(shard, [3]))
    assert rows_of(part) == rows_of(whole)[700:800]
    with pytest.raises(ValueError, match=r"has no 'shard-000008\.tar'"):
        part.fingerprint("shard-000008.tar")


@pytest.mark.parametrize(("one", "two"), [("a.jpg", "a.png"), ("x/a.jpg", "x_a.jpg"), ("a b.png", "a.b.png")])
def test_of_two_images_with_one_key_the_second_is_left_out_and_both_are_named(tmp_path, one, two):
    for name in (one, two, "other.png"):
        save(tmp_path / name)
    found = listed(tmp_path)
    assert set(found.paths().values()) == {one, "other.png"}
    (reject,) = found.rejects
    assert reject.path == two
    assert reject.reason.startswith(f"has the key of {one!r}")


def test_what_cannot_be_read_is_left_out_with_its_reason(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "locked.png").chmod(0)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "gone")
    (tmp_path / os.fsdecode(b"latin\xe9.png")).write_bytes(b"")
    found = listed(tmp_path)
    reasons = {reject.path: reject.reason for reject in found.rejects}
    expected = {
        "link.png": "cannot be read: No such file or directory",
        "locked.png": "cannot be read: Permission denied",
        "pipe.png": "cannot be read: no plain file",
        "'latin\\udce9.png'": "its name is no UTF-8 text; rename it",
    }
    if os.geteuid() == 0:  # may read all
        del expected["locked.png"]
    assert reasons == expected
    assert found.num_samples == len(rows_of(found)) == 5 - len(expected)
    for name in ("a.png", "locked.png"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"no usable image in .*: "):
        listed(tmp_path)


def test_pictures_of_other_formats_are_counted_and_said(tmp_path, caplog):
    for name in ("a.webp", "b.WEBP", "deep/c.gif", ".d.gif", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image in .*there are 1 \.gif, 2 \.webp, to be converted"):
        listed(tmp_path)
    save(tmp_path / "e.png")
    assert listed(tmp_path).unread == {".gif": 1, ".webp": 2}
    assert listed(tmp_path).unread == {".gif": 1, ".webp": 2}  # as classes are looked for before images are
    assert caplog.text.count("left out are 1 .gif, 2 .webp") == 1


def test_pictures_that_viewers_turn_are_counted(tmp_path, caplog):
    turned, upright = Image.Exif(), Image.Exif()
    turned[274], upright[274] = 6, 1
    for name, options in {"a.jpg": {"exif": turned}, "b.png": {"exif": turned}, "c.jpg": {"exif": upright}}.items():
        save(tmp_path / name, **options)
    save(tmp_path / "d.jpg")
    # A damaged EXIF block says nothing, and is no reason to refuse the picture.
    data = bytearray((tmp_path / "a.jpg").read_bytes())
    place = data.index(b"Exif\0\0") + 6
    data[place : place + 4] = b"damn"
    (tmp_path / "e.jpg").write_bytes(data)
    assert [(row.width, row.height) for row in rows_of(listed(tmp_path))] == [(20, 10)] * 5
    assert "2 images carry an EXIF orientation" in caplog.text


def test_folders_that_cannot_be_listed_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no folder of images .*nowhere"):
        listed(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no image in"):
        listed(tmp_path)
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="images_per_shard must be at least 1, got 0"):
        listed(tmp_path, images_per_shard=0)


def test_rows_and_files_that_are_not_there_are_named(folder):
    found = listed(folder)
    with pytest.raises(ValueError, match=r"shard-000002\.tar has rows 0\.\.0, wanted are \[1, 4\]"):
        next(found.read("shard-000002.tar", [4, 0, 1]))
    gone = Path(folder, found.names[0][1])
    gone.unlink()
    with pytest.raises(BrokenShardError, match=f"{gone} cannot be read: No such file"):
        list(found.read("shard-000000.tar", [0, 1]))
    assert (rows_of(found)[1].width, len(rows_of(found))) == (0, 7)  # its shard fails alone, where it is read
