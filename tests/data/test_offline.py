"""Labels on disk are joined by key, are those of the image shards at hand, and may be replaced while they are read."""

import json
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dfa.data import storage
from dfa.data.offline import (
    OfflineLabels,
    begin_generations,
    check_labels,
    current_generation,
    read_masks,
    resolve,
    set_current,
)
from dfa.data.reading import CropSettings, Reader
from dfa.data.shards import BrokenShardError, ShardIndex, read_samples
from tests.data.object_store import address, object_store
from tests.data.toy_labels import make_current, png, write_labels
from tests.train.toy import write_toy_shards


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_toy_shards(tmp_path_factory.mktemp("shards") / "toy", num_samples=10, samples_per_shard=4)


def masks_of(index: ShardIndex, shift: int = 0) -> dict[str, bytes]:
    """A mask of its own for each key."""
    return {row.key: png(np.full((16, 16), (int(row.key[1:]) + shift) % 4)) for row in read_samples(index)}


def offline(root: Path, index: ShardIndex) -> OfflineLabels:
    return OfflineLabels(str(root), index.class_names, index.plan_hash)


def test_a_folder_of_labels_is_read_itself_and_generations_through_their_current_one(index, tmp_path):
    plain = write_labels(tmp_path / "plain", index, masks_of(index))
    assert resolve(plain) == plain
    generations = tmp_path / "follow"
    assert begin_generations(str(generations)) is None
    assert resolve(str(generations)) is None
    first = write_labels(generations / "step-00000040", index, masks_of(index))
    assert resolve(str(generations)) is None  # written, and not yet declared finished
    make_current(generations, "step-00000040")
    assert resolve(str(generations)) == first
    second = write_labels(generations / "step-00000080", index, masks_of(index))
    make_current(generations, "step-00000080")
    assert resolve(str(generations)) == second


def test_an_address_where_nothing_is_or_will_be_is_refused_by_its_name(tmp_path):
    misspelt = tmp_path / "train_folow"
    with pytest.raises(ValueError, match=rf"{misspelt} is not there: it has neither finished labels .* of a follower"):
        resolve(str(misspelt))
    misspelt.mkdir()
    with pytest.raises(ValueError, match=rf"{misspelt} holds neither finished labels .* of a follower; give the"):
        resolve(str(misspelt))


def test_beginning_generations_again_keeps_the_current_one(tmp_path):
    root = str(tmp_path / "follow")
    assert begin_generations(root) is None and begin_generations(root) is None
    set_current(root, "step-00000040-aa")
    assert begin_generations(root) == current_generation(root) == "step-00000040-aa"


def test_a_folder_that_cannot_be_made_for_generations_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=rf"labels cannot be written to {tmp_path}/file/follow"):
        begin_generations(str(tmp_path / "file/follow"))


def test_labels_whose_job_was_not_finished_are_refused(index, tmp_path):
    write_labels(tmp_path / "plain", index, masks_of(index))
    (tmp_path / "plain/index.json").unlink()
    with pytest.raises(ValueError, match=r"plain has a plan.json and no index.json.*run jobs/pseudo_label again"):
        resolve(str(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"kind": "dfa-label-generations", "folder": "../elsewhere"}, r"names the folder '../elsewhere'"),
        ({"kind": "dfa-label-generations", "folder": ""}, r"names the folder ''"),
        ({"kind": "dfa-label-generations"}, r"names the folder ''"),
        ({"kind": "dfa-shards", "folder": "a"}, r"is not of kind 'dfa-label-generations'"),
        (["a"], r"is not of kind 'dfa-label-generations'"),
    ],
)
def test_a_current_file_names_a_folder_beside_it_or_is_refused(tmp_path, document, message):
    (tmp_path / "current.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/current.json") + " " + message):
        resolve(str(tmp_path))


def test_masks_are_joined_by_key_and_rejected_keys_are_absent(index, tmp_path):
    masks = masks_of(index)
    rows = [row for row in read_samples(index) if row.shard == index.shards[1].name]
    rejected, others = rows[1].key, {row.key for row in rows} - {rows[1].key}
    root = write_labels(tmp_path / "labels", index, {key: data for key, data in masks.items() if key != rejected})
    found = read_masks(root, index.shards[1].name, {row.key for row in rows})
    assert found == {key: masks[key] for key in others}
    assert read_masks(root, index.shards[1].name, {rows[0].key}) == {rows[0].key: masks[rows[0].key]}
    assert read_masks(write_labels(tmp_path / "none", index, {}), index.shards[1].name, others) == {}


def test_a_missing_label_shard_is_named(index, tmp_path):
    root = write_labels(tmp_path / "labels", index, masks_of(index))
    (tmp_path / "labels" / index.shards[2].name).unlink()
    with pytest.raises(ValueError, match=rf"label shard {re.escape(root)}/{index.shards[2].name} is missing"):
        read_masks(root, index.shards[2].name, {"k0001"})
    with pytest.raises(ValueError, match=rf"{index.shards[2].name} is missing"):
        offline(tmp_path / "labels", index).masks(index.shards[2].name, {"k0001"})


def test_labels_of_another_data_set_are_refused_with_both_sides_named(index, tmp_path):
    labels = write_labels(tmp_path / "labels", index, masks_of(index))
    check_labels(labels, index)
    other = replace(index, class_names=("cat", "hen", "owl"))
    with pytest.raises(ValueError, match=r"class 2 is 'dog' in the labels and 'hen' in the shards"):
        check_labels(labels, other)
    with pytest.raises(ValueError, match=r"labels 3 classes, the image shards hold 4.*class 4 is None .* and 'hen'"):
        check_labels(labels, replace(index, class_names=(*index.class_names, "hen")))
    with pytest.raises(ValueError, match=r"class 2 is 'dog' in the labels and 'hen' in the shards"):
        offline(tmp_path / "labels", other).masks(index.shards[0].name, {"k0001"})


def test_labels_of_another_sharding_are_refused(index, tmp_path):
    labels = write_labels(tmp_path / "labels", index, masks_of(index), image_plan_hash="0123456789abcdef")
    with pytest.raises(ValueError, match=rf"plan 0123456789ab\).*plan {index.plan_hash[:12]}\); run jobs/pseudo_label"):
        check_labels(labels, index)


def test_labels_of_some_shards_or_of_other_bytes_are_refused(index, tmp_path):
    entries = [{"name": shard.name, "image_sha256": shard.sha256} for shard in index.shards]
    part = write_labels(tmp_path / "part", index, masks_of(index), shards=entries[:2])
    with pytest.raises(ValueError, match=rf"no labels of 1 of the 3 shards .*{index.shards[2].name}"):
        check_labels(part, index)
    entries[1]["image_sha256"] = "0" * 64
    changed = write_labels(tmp_path / "changed", index, masks_of(index), shards=entries)
    with pytest.raises(ValueError, match=rf"sha256 of \['{index.shards[1].name}'\] differ"):
        check_labels(changed, index)


def test_image_shards_in_the_labels_place_are_refused(index):
    with pytest.raises(ValueError, match=r"is of kind 'dfa-shards', not 'dfa-labels'"):
        check_labels(index.root, index)


@pytest.mark.parametrize("whole_index", [True, False])
def test_a_generation_that_vanishes_while_it_is_read_gives_way_to_the_next(index, tmp_path, whole_index):
    shard, keys = index.shards[0].name, {row.key for row in read_samples(index) if row.shard == index.shards[0].name}
    first = Path(write_labels(tmp_path / "step-00000040", index, masks_of(index)))
    make_current(tmp_path, first.name)
    # A pipe in the index's place holds the reader there until the generation has been replaced and deleted.
    content = (first / "index.json").read_bytes()
    (first / "index.json").unlink()
    os.mkfifo(first / "index.json")

    def refresh() -> None:
        with (first / "index.json").open("wb") as pipe:
            make_current(tmp_path, Path(write_labels(tmp_path / "step-00000080", index, masks_of(index, shift=1))).name)
            shutil.rmtree(first)
            pipe.write(content if whole_index else b"")

    writer = threading.Thread(target=refresh)
    writer.start()
    found = offline(tmp_path, index).masks(shard, keys)
    writer.join()
    assert found == {key: data for key, data in masks_of(index, shift=1).items() if key in keys}


def test_a_broken_generation_that_nothing_replaces_is_an_error(index, tmp_path):
    root = write_labels(tmp_path / "step-00000040", index, masks_of(index))
    make_current(tmp_path, "step-00000040")
    cut = Path(root) / index.shards[0].name
    cut.write_bytes(cut.read_bytes()[:1500])
    with pytest.raises(BrokenShardError, match=rf"step-00000040/{index.shards[0].name} cannot be read"):
        offline(tmp_path, index).masks(index.shards[0].name, {"k0001"})
    shutil.rmtree(root)
    with pytest.raises(ValueError, match=r"step-00000040 has no index.json"):
        offline(tmp_path, index).masks(index.shards[0].name, {"k0001"})


def test_shards_in_an_object_store_find_their_labels(index, tmp_path):
    write_labels(tmp_path / "labels", index, masks_of(index))
    name, crop = index.shards[0].name, CropSettings(12, (1.0, 1.0), 0.0, 10**6)
    with object_store() as port:
        path = storage.join(address(port, "train"), name)
        data = storage.read_bytes(index.path(name))
        storage.write_atomic(path, lambda file: file.write(data))
        reader = Reader(path, 0, 3, 0, crop, False, offline(tmp_path / "labels", index))
        (columns,) = reader.blocks(0, np.arange(index.shards[0].num_samples), dict)
    assert columns["given"].all()
