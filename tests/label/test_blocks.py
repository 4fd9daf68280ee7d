import numpy as np
import pytest
import torch

from dfa.core.analysis.truncation import block_annotation
from dfa.data.offline import OfflineLabels, check_labels
from dfa.data.shards import read_samples
from dfa.data.transforms import decode_mask
from dfa.label.blocks import write_block_labels, write_block_pngs
from dfa.label.finished import read_label_rows
from tests.analysis.made import truth_of, write_images, write_pngs

KEYS = [f"k{number}" for number in range(6)]


@pytest.fixture
def truths():
    return {key: truth_of(number) for number, key in enumerate(KEYS)}


def contents(root):
    found = {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {path: data for path, data in found.items() if path.parts[0] != "timings"}


def test_training_reads_block_wise_labels_as_any_others(tmp_path, truths):
    index = write_images(tmp_path / "images", truths)
    report = write_block_labels(index, str(tmp_path / "labels"), grid=3, max_pixels=10_000)
    assert report.num_samples == 6 and not report.rejects
    check_labels(str(tmp_path / "labels"), index)
    labels = OfflineLabels(str(tmp_path / "labels"), index.class_names, index.plan_hash)
    for row in read_samples(index):
        mask = decode_mask(labels.masks(row.shard, [row.key])[row.key], max_pixels=10_000)
        expected = block_annotation(torch.from_numpy(truths[row.key]), grid=3).numpy()
        np.testing.assert_array_equal(mask, expected)
        assert len(np.unique(mask, axis=0)) <= 3
    kept = {row.key: row.agreement_seed for row in read_label_rows(str(tmp_path / "labels"))}
    for key, share in kept.items():
        expected = (block_annotation(torch.from_numpy(truths[key]), grid=3).numpy() == truths[key]).mean()
        assert share == pytest.approx(expected, abs=1e-6)


def test_a_killed_writer_goes_on_to_the_same_bytes(tmp_path, truths):
    index = write_images(tmp_path / "images", truths)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for root in (whole, killed):
        write_block_labels(index, str(root), grid=3, max_pixels=10_000)
    (killed / "index.json").unlink()
    (killed / "shard-000001.json").unlink()
    before = (killed / "shard-000000.tar").stat().st_mtime_ns
    write_block_labels(index, str(killed), grid=3, max_pixels=10_000)
    assert contents(killed) == contents(whole)
    assert (killed / "shard-000000.tar").stat().st_mtime_ns == before
    write_block_labels(index, str(killed), grid=5, max_pixels=10_000)
    assert contents(killed) != contents(whole)


def test_shards_without_masks_are_refused(tmp_path, truths):
    index = write_images(tmp_path / "images", truths, with_masks=False)
    with pytest.raises(ValueError, match=r"holds no usable masks: the image shard holds no mask of it"):
        write_block_labels(index, str(tmp_path / "labels"), grid=3, max_pixels=10_000)


def test_changed_shards_are_refused(tmp_path, truths):
    index = write_images(tmp_path / "images", truths)
    path = tmp_path / "images/shard-000000.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(ValueError, match=r"shard-000000.tar has changed since it was indexed"):
        write_block_labels(index, str(tmp_path / "labels"), grid=3, max_pixels=10_000)


def test_a_folder_of_masks_keeps_its_names(tmp_path, truths):
    source = write_pngs(tmp_path / "masks", {f"trip/{key}": mask for key, mask in truths.items()})
    out = tmp_path / "out"
    assert write_block_pngs(source, str(out), grid=4, max_pixels=10_000) == 6
    for key, mask in truths.items():
        found = decode_mask((out / f"trip/{key}.png").read_bytes(), max_pixels=10_000)
        np.testing.assert_array_equal(found, block_annotation(torch.from_numpy(mask), grid=4).numpy())
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    write_block_pngs(source, str(out), grid=4, max_pixels=10_000)
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    (tmp_path / "masks/broken.png").write_bytes(b"no PNG")
    with pytest.raises(ValueError, match=r"masks/broken.png: "):
        write_block_pngs(source, str(out), grid=4, max_pixels=10_000)
