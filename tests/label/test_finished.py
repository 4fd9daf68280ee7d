"""What a finished folder of labels says of itself: rows, members."""

import tarfile

import pytest

from dfa.data.shards import BrokenShardError
from dfa.label.finished import read_label_rows, read_members
from tests.label.folder import Label, blocks, write_labels


def test_rows_with_shares_outside_0_to_1_are_named(tmp_path):
    for wrong in (1.5, float("nan")):
        root = write_labels(tmp_path / str(wrong), [[Label("x", blocks(), (1,), confidence=wrong)]])
        with pytest.raises(ValueError, match=f"key 'x': confidence is {wrong}"):
            list(read_label_rows(root))


def test_members_are_read_by_name_and_a_cut_shard_is_noticed(tmp_path):
    extra = (("confidence.png", b"certain"), ("soft.png", b"soft"))
    root = tmp_path / "labels"
    write_labels(root, [[Label(key, blocks(), (1,), members=extra) for key in "xyz"]])
    path = root / "shard-000000.tar"
    found = read_members(str(path), {"y.confidence.png", "z.soft.png", "z.other.png"})
    assert found == {"y.confidence.png": b"certain", "z.soft.png": b"soft"}
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(BrokenShardError, match=r"shard-000000\.tar"):
        read_members(str(path), {"z.soft.png"})


def test_members_that_are_no_plain_file_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("x.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    with pytest.raises(BrokenShardError, match=r"'x\.png'"):
        read_members(str(tmp_path / "x.tar"), {"x.png"})
