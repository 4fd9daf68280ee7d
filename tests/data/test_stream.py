"""The stream's content is a function of (seed, epoch, key) alone, and nothing is lost between shards and batches."""

import errno
import hashlib
import io
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dfa.data.consumed import ConsumedEpoch
from dfa.data.offline import OfflineLabels, begin_generations
from dfa.data.reading import CropSettings, Reader
from dfa.data.shards import BrokenShardError, ShardIndex, load_index, read_samples, read_shard
from dfa.data.stream import Batch, eval_batches, ingest_options, iterate, to_batch, train_stream
from tests.data.toy_labels import make_current, png, write_block_shards, write_labels
from tests.train.toy import write_toy_shards

CROP = CropSettings(size=12, scale_range=(0.5, 2.0), flip_probability=0.5, max_pixels=10**6)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_toy_shards(tmp_path_factory.mktemp("shards") / "toy", num_samples=23, samples_per_shard=8)


@pytest.fixture
def broken(tmp_path: Path) -> ShardIndex:
    """Twelve samples in two shards; the picture of k0003 has a wrong byte in its pixels."""
    index = write_toy_shards(tmp_path / "toy", num_samples=12, samples_per_shard=6)
    picture = (tmp_path / "toy-source" / "k0003.png").read_bytes()
    for path in (tmp_path / "toy").glob("*.tar"):
        data = bytearray(path.read_bytes())
        if (at := data.find(picture)) >= 0:
            data[at + len(picture) // 2] ^= 0xFF
            path.write_bytes(data)
    return index


def stream(index: ShardIndex, num_samples: int, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "seed": 5,
        "finished_epochs": 0,
        "open_epochs": {},
        "crop": CROP,
        "with_masks": True,
        "num_workers": 1,
        "read_cpus": 0.25,
        "max_readers": 2,
    }
    return train_stream(index, num_samples=num_samples, **{**settings, **changes})


def fingerprints(batches: Iterator[Batch]) -> dict[tuple[int, int], str]:
    """(epoch, sample) -> hash of everything that a sample carries; a repeated pair fails."""
    found: dict[tuple[int, int], str] = {}
    for batch in batches:
        assert batch.mask_BHW is not None
        for i, key in enumerate(batch.keys):
            pair = (int(batch.epoch_B[i]), int(batch.sample_B[i]))
            assert pair not in found
            arrays = (batch.image_B3HW[i], batch.valid_BHW[i], batch.labels_BC[i], batch.mask_BHW[i])
            found[pair] = hashlib.sha256(key.encode() + b"".join(a.numpy().tobytes() for a in arrays)).hexdigest()
    return found


def split(dataset: Any, num_workers: int) -> list[list[Batch]]:
    """What each of several workers gets, read at the same time as Ray Train's workers do."""
    dataset.context.execution_options = ingest_options(window_bytes=2**26)
    parts: list[list[Batch]] = [[] for _ in range(num_workers)]
    shards = dataset.streaming_split(num_workers, equal=True)
    threads = [
        threading.Thread(target=lambda i=i: parts[i].extend(iterate(shards[i], batch_size=4, prefetch=1)))
        for i in range(num_workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return parts


def test_one_worker_and_three_see_the_same_crops(ray_session: None, index: ShardIndex) -> None:
    one = fingerprints(iterate(stream(index, 50), batch_size=4, prefetch=1))
    assert len(one) == 50
    parts = split(stream(index, 50, num_workers=3), 3)
    three = fingerprints(batch for part in parts for batch in part)
    assert three == one
    counts = [sum(len(batch) for batch in part) for part in parts]
    assert sum(counts) == 50
    assert max(counts) <= 17  # 50 samples and one filler row over three workers


def test_an_interrupted_stream_continues_with_the_rest(ray_session: None, index: ShardIndex) -> None:
    whole = fingerprints(iterate(stream(index, 40), batch_size=4, prefetch=1))
    sizes = np.array([shard.num_samples for shard in index.shards])
    consumed, epoch = np.zeros(23, bool), ConsumedEpoch(sizes)
    consumed[[*range(8), *np.random.default_rng(0).permutation(np.arange(8, 23))[:6]]] = True  # one shard whole
    for shard, first in enumerate(np.cumsum(sizes) - sizes):
        epoch.add(shard, np.flatnonzero(consumed[first : first + sizes[shard]]))
    rest = fingerprints(iterate(stream(index, 40, open_epochs={0: epoch}), batch_size=4, prefetch=1))
    assert rest == {pair: mark for pair, mark in whole.items() if pair[0] > 0 or not consumed[pair[1]]}


def test_a_broken_picture_is_counted_and_left_out(ray_session: None, broken: ShardIndex) -> None:
    batches = list(iterate(stream(broken, 12), batch_size=4, prefetch=1))
    (reject,) = (reject for batch in batches for reject in batch.rejected)
    assert reject.key == "k0003"
    assert "does not decode" in reject.reason
    pairs = {*fingerprints(iter(batches)), (reject.epoch, reject.sample)}
    assert pairs == {(0, i) for i in range(12)}


def test_a_broken_shard_is_an_error_that_names_it(ray_session: None, index: ShardIndex, tmp_path: Path) -> None:
    for name in ("index.json", *(shard.name for shard in index.shards)):
        (tmp_path / name).write_bytes((Path(index.root) / name).read_bytes())
    cut = tmp_path / index.shards[1].name
    cut.write_bytes(cut.read_bytes()[:3000])
    with pytest.raises(Exception, match=re.escape(cut.name) + " cannot be read after"):
        list(iterate(stream(load_index(str(tmp_path)), 23), batch_size=4, prefetch=1))


def read(index: ShardIndex, shard: int, rows: list[int], **changes: Any) -> list[Mapping[str, Any]]:
    settings = {"offset": 0, "num_classes": 3, "seed": 5, "crop": CROP, "with_masks": False, **changes}
    reader = Reader(path=index.path(index.shards[shard].name), **settings)
    return list(reader.blocks(0, np.array(rows, np.int32), dict))


def test_rows_come_in_the_order_of_the_item(index: ShardIndex) -> None:
    (columns,) = read(index, 0, [4, 0, 6], offset=100)
    assert columns["sample"].tolist() == [104, 100, 106]
    assert "mask" not in columns
    batch = to_batch(columns)
    assert batch.mask_BHW is None
    assert batch.image_B3HW.shape == (3, 3, 12, 12)
    assert batch.labels_BC.sum(1).tolist() == [1, 1, 1]
    classes = [int(key[1:]) % 3 for key in batch.keys]
    assert batch.labels_BC.int().argmax(1).tolist() == classes


def test_blocks_are_bounded_in_bytes(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfa.data.reading.BLOCK_BYTES", 2000)  # three rows of 12 x 12 x 3 bytes and their notes
    blocks = read(index, 0, list(range(7)))
    assert [len(block["key"]) for block in blocks] == [3, 3, 1]


def test_a_shard_that_lost_its_end_names_the_last_good_key(index: ShardIndex, tmp_path: Path) -> None:
    path = tmp_path / "shard-000000.tar"
    path.write_bytes(Path(index.path(index.shards[0].name)).read_bytes()[:3000])
    with pytest.raises(BrokenShardError, match=r"shard-000000\.tar .*after"):
        list(Reader(str(path), 0, 3, 5, CROP, False).blocks(0, np.arange(7, dtype=np.int32), dict))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_block_shards(tmp_path_factory.mktemp("blocks") / "blocks", num_samples=12, samples_per_shard=4)


def true_masks(index: ShardIndex) -> dict[str, bytes]:
    """The ground truth of every sample, to serve as a label."""
    raws = [raw for shard in index.shards for raw in read_shard(index.path(shard.name))]
    return {raw.key: raw.mask for raw in raws if raw.mask is not None}


def offline(root: Path, index: ShardIndex) -> OfflineLabels:
    return OfflineLabels(str(root), index.class_names, index.plan_hash)


def keys_of(index: ShardIndex, shard: int) -> list[str]:
    return [row.key for row in read_samples(index) if row.shard == index.shards[shard].name]


@pytest.mark.parametrize("scale_range", [(1.0, 1.0), (0.5, 2.0)])
def test_a_label_is_cropped_with_its_image_as_ground_truth_is(
    blocks: ShardIndex, tmp_path: Path, scale_range: tuple[float, float]
) -> None:
    write_labels(tmp_path / "labels", blocks, true_masks(blocks))
    crop = CropSettings(size=32, scale_range=scale_range, flip_probability=0.5, max_pixels=10**6)
    (labelled,) = read(blocks, 0, [2, 0, 1, 3], crop=crop, labels=offline(tmp_path / "labels", blocks))
    (true,) = read(blocks, 0, [2, 0, 1, 3], crop=crop, with_masks=True)
    assert labelled["given"].tolist() == [True] * 4
    assert {name for name in true if not (true[name] == labelled[name]).all()} == set()
    valid = to_batch(labelled).valid_BHW.numpy()
    assert (labelled["mask"][~valid] == 255).all()
    if scale_range == (1.0, 1.0):  # no pixel is a mixture: the image says what its label must be
        assert (labelled["mask"] == labelled["image"][:, 0] // 60)[valid].all()
    assert 0 < valid.mean() < 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_filler", [0, 2])
def test_padding_is_invalid_and_tensors_are_writable(blocks: ShardIndex, num_filler: int) -> None:
    crop = CropSettings(size=32, scale_range=(0.5, 2.0), flip_probability=0.5, max_pixels=10**6)
    (columns,) = read(blocks, 0, [2, 0, 1, 3], crop=crop)
    if num_filler:
        (filler,) = Reader("", 0, 3, 5, crop, False).filler(num_filler, dict)
        columns = {name: np.concatenate([column, filler[name]]) for name, column in columns.items()}
    for column in columns.values():
        column.setflags(write=False)  # as Ray may give them: torch warns
    batch = to_batch(columns)
    grey = (batch.image_B3HW[:, 0] == batch.image_B3HW[:, 1]).numpy()  # pictures are, padding is not
    assert (batch.valid_BHW.numpy() == grey).all() and 0 < grey.mean() < 1
    assert batch.valid_BHW.shape == (4, 32, 32)


def test_a_sample_without_a_label_is_void_and_says_so(blocks: ShardIndex, tmp_path: Path) -> None:
    masks, rejected = true_masks(blocks), keys_of(blocks, 1)[2]
    masks.pop(rejected)
    write_labels(tmp_path / "labels", blocks, masks)
    (columns,) = read(blocks, 1, [3, 2, 0], labels=offline(tmp_path / "labels", blocks))
    batch = to_batch(columns)
    assert batch.given_B is not None and batch.mask_BHW is not None
    assert batch.given_B.tolist() == [key != rejected for key in batch.keys] == [True, False, True]
    assert (batch.mask_BHW[1] == 255).all() and not (batch.mask_BHW[0] == 255).all()
    assert not batch.rejected


def test_before_the_first_generation_no_sample_has_a_label(blocks: ShardIndex, tmp_path: Path) -> None:
    begin_generations(str(tmp_path / "follow"))
    (columns,) = read(blocks, 0, [1, 0], labels=offline(tmp_path / "follow", blocks))
    assert columns["given"].tolist() == [False, False] and (columns["mask"] == 255).all()


def test_labels_that_do_not_fit_their_image_reject_the_sample(blocks: ShardIndex, tmp_path: Path) -> None:
    masks = true_masks(blocks)
    size, value, broken, good = keys_of(blocks, 0)
    masks |= {size: png(np.zeros((24, 25))), value: png(np.full((24, 24), 4)), broken: masks[broken][:60]}
    write_labels(tmp_path / "labels", blocks, masks)
    (columns,) = read(blocks, 0, [0, 1, 2, 3], labels=offline(tmp_path / "labels", blocks))
    batch = to_batch(columns)
    assert batch.keys == (good,) and batch.given_B is not None and batch.given_B.tolist() == [True]
    reasons = {reject.key: reject.reason for reject in batch.rejected}
    assert reasons[size] == "pseudo-label is (24, 25), image is (24, 24) (height, width)"
    assert reasons[value].startswith("pseudo-label has values [4]; allowed are 0..3 and 255")
    assert "does not decode" in reasons[broken]


def test_a_refreshed_generation_is_read_at_the_next_item(blocks: ShardIndex, tmp_path: Path) -> None:
    for step, value in ((40, 1), (80, 2)):
        masks = {row.key: png(np.full((24, 24), value)) for row in read_samples(blocks)}
        write_labels(tmp_path / f"step-{step:08d}", blocks, masks)
    begin_generations(str(tmp_path))
    reader = Reader(blocks.path(blocks.shards[0].name), 0, 3, 5, CROP, False, offline(tmp_path, blocks))

    def classes(epoch: int) -> list[int]:
        (columns,) = reader.blocks(epoch, np.arange(4, dtype=np.int32), dict)
        return np.unique(columns["mask"][to_batch(columns).valid_BHW]).tolist()

    assert classes(0) == [255]
    make_current(tmp_path, "step-00000040")
    assert classes(1) == [1]
    make_current(tmp_path, "step-00000080")
    assert classes(2) == [2]


def test_labels_come_through_ray_with_every_sample(ray_session: None, blocks: ShardIndex, tmp_path: Path) -> None:
    masks, rejected = true_masks(blocks), {keys_of(blocks, 0)[1], keys_of(blocks, 2)[0]}
    root = write_labels(tmp_path / "labels", blocks, {k: v for k, v in masks.items() if k not in rejected})
    batches = list(iterate(stream(blocks, 24, with_masks=False, labels=root), batch_size=4, prefetch=1))
    given = {}
    for batch in batches:
        assert batch.given_B is not None
        given |= dict(zip(batch.keys, batch.given_B.tolist(), strict=True))
    assert given == {key: key not in rejected for key in masks}
    assert sum(map(len, batches)) == 24
    true = fingerprints(iterate(stream(blocks, 24), batch_size=4, prefetch=1))
    same = {pair for pair, mark in fingerprints(iter(batches)).items() if mark == true[pair]}
    assert len(same) == 24 - 2 * len(rejected)


def test_ground_truth_and_labels_exclude_each_other(blocks: ShardIndex) -> None:
    with pytest.raises(ValueError, match=r"ground truth and the labels of somewhere cannot both be the mask"):
        stream(blocks, 4, labels="somewhere")


@pytest.mark.parametrize("world", [1, 2, 5])
def test_ranks_share_the_validation_samples(index: ShardIndex, world: int) -> None:
    parts = [
        list(eval_batches(index, rank=r, world=world, batch_size=3, max_pixels=10**6, limit=17)) for r in range(world)
    ]
    numbers = [[int(n) for batch in part for n in batch.sample_B] for part in parts]
    assert sorted(n for part in numbers for n in part) == list(range(17))
    assert max(map(len, numbers)) - min(map(len, numbers)) <= 1
    for batch in (batch for part in parts for batch in part):
        assert batch.mask_BHW is not None
        assert batch.image_B3HW.shape[2:] == batch.mask_BHW.shape[1:] == (16, 16)
        assert (batch.mask_BHW[:, 0, 0].int() == batch.labels_BC.int().argmax(1) + 1).all()
        assert len(batch) <= 3


def test_a_shard_that_cannot_be_read_for_a_moment_is_read_again(
    index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dfa.data.reading.RETRY_PAUSES_S", (0.05, 0.3, 2.0))
    shard = tmp_path / "shard.tar"
    shard.mkdir()  # opening a folder is an OSError, as a failing disk is

    def mend() -> None:
        shard.rmdir()
        shutil.copy(index.path(index.shards[0].name), shard)

    timer = threading.Timer(0.2, mend)
    timer.start()
    reader = Reader(str(shard), 0, 3, 5, CROP, False)
    (columns,) = reader.blocks(0, np.arange(7, dtype=np.int32), dict)
    timer.join()
    assert columns["sample"].tolist() == list(range(7))
    assert "shard.tar is read again in" in caplog.text


def test_a_shard_that_stays_unreadable_is_given_up_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfa.data.reading.RETRY_PAUSES_S", (0.01, 0.01))
    (tmp_path / "shard.tar").mkdir()
    reader = Reader(str(tmp_path / "shard.tar"), 0, 3, 5, CROP, False)
    with pytest.raises(BrokenShardError, match=r"shard\.tar: given up after 3 reads: .*Is a directory"):
        list(reader.blocks(0, np.arange(7, dtype=np.int32), dict))


class FailingDisk:
    """Opens files for the storage; of the `name` each of the first `failures` openings ends in EIO half way."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, failures: int) -> None:
        self.name, self.failures = name, failures
        patch.setattr("dfa.data.storage.open", self.open, raising=False)
        patch.setattr("dfa.data.reading.RETRY_PAUSES_S", (0.01, 0.01))

    def open(self, path: str, mode: str) -> Any:
        if not path.endswith(self.name) or not self.failures:
            return open(path, mode)
        self.failures -= 1
        half = os.path.getsize(path) // 2

        class Failing(io.FileIO):
            def readinto(self, buffer: Any) -> int:
                if self.tell() > half:
                    raise OSError(errno.EIO, os.strerror(errno.EIO), path)
                return super().readinto(buffer) or 0

            def readall(self) -> bytes:
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)

        return io.BufferedReader(Failing(path), 512)


def validated(index: ShardIndex) -> list[tuple[int, str]]:
    batches = eval_batches(index, rank=0, world=1, batch_size=3, max_pixels=10**6)
    return [row for batch in batches for row in zip(batch.sample_B.tolist(), batch.keys, strict=True)]


def test_validation_goes_on_where_the_disk_failed(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = validated(index)
    assert [sample for sample, _ in whole] == list(range(23))
    disk = FailingDisk(monkeypatch, index.shards[1].name, failures=2)
    assert validated(index) == whole
    assert disk.failures == 0
    disk.failures = 3
    with pytest.raises(
        BrokenShardError, match=r"shard-000001\.tar: given up after 3 reads: .* after key .*Input/output"
    ):
        validated(index)


def test_labels_are_read_again_where_the_disk_failed(
    blocks: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_labels(tmp_path / "labels", blocks, true_masks(blocks))
    (whole,) = read(blocks, 1, [2, 0, 1, 3], labels=offline(tmp_path / "labels", blocks))
    for name in ("shard-000001.tar", "index.json"):
        disk = FailingDisk(monkeypatch, f"{root}/{name}", failures=2)
        (columns,) = read(blocks, 1, [2, 0, 1, 3], labels=offline(tmp_path / "labels", blocks))
        assert disk.failures == 0
        assert columns["given"].all() and (columns["mask"] == whole["mask"]).all()
    assert f"label shard shard-000001.tar of {root} is read again in" in caplog.text
    FailingDisk(monkeypatch, f"{root}/shard-000001.tar", failures=3)
    with pytest.raises(BrokenShardError, match=rf"of {root}: given up after 3 reads: .*Input/output error"):
        read(blocks, 1, [2, 0, 1, 3], labels=offline(tmp_path / "labels", blocks))


@pytest.mark.parametrize("of", ["images", "labels"])
def test_damage_is_not_read_again(
    blocks: ShardIndex, tmp_path: Path, of: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(blocks.root, tmp_path / "images")
    write_labels(tmp_path / "labels", blocks, true_masks(blocks))
    cut, index = tmp_path / of / "shard-000001.tar", load_index(str(tmp_path / "images"))
    cut.write_bytes(cut.read_bytes()[:3000])
    with pytest.raises(BrokenShardError, match=rf"{cut} cannot be read after"):
        read(index, 1, [2, 0, 1, 3], labels=offline(tmp_path / "labels", index))
    if of == "images":
        with pytest.raises(BrokenShardError, match=rf"{cut} cannot be read after"):
            validated(index)
    assert "read again" not in caplog.text
