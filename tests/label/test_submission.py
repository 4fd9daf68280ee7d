"""The archive for VOC's server, read back with tarfile and PIL alone."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from dfa.data import storage
from dfa.data.classes import voc_palette
from dfa.label.submission import export_submission
from tests.label.folder import Label, write_labels

RANDOM = np.random.default_rng(0)
LABELS = {f"2008_00000{n}": RANDOM.choice(np.array([0, 1, 2, 3], np.uint8), (5 + n, 9)) for n in range(5)}
SHARDS = tuple(
    tuple(Label(key, mask, ()) for key, mask in list(LABELS.items())[part]) for part in (slice(3), slice(3, 5))
)


@pytest.fixture
def root(tmp_path):
    root = write_labels(tmp_path / "labels", SHARDS)
    index = storage.join(root, "index.json")
    storage.write_json(index, storage.read_json(index) | {"num_rejects": 0, "reject_reasons": {}})
    return root


@pytest.mark.parametrize("competition", ["comp5", "comp6"])
def test_the_archive_has_the_servers_layout_and_the_masks_as_palette_pngs(root, tmp_path, competition):
    address = str(tmp_path / "results.tgz")
    assert export_submission(root, address, competition=competition) == 5
    with tarfile.open(address, "r:gz") as tar:
        found = {member.name: Image.open(io.BytesIO(tar.extractfile(member).read())) for member in tar}
    folder = f"results/VOC2012/Segmentation/{competition}_test_cls"
    assert set(found) == {f"{folder}/{key}.png" for key in LABELS}
    for key, mask in LABELS.items():
        picture = found[f"{folder}/{key}.png"]
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture), mask)
        assert picture.getpalette()[: 3 * 21] == voc_palette().reshape(-1)[: 3 * 21].tolist()


def test_the_same_labels_give_the_same_archive(root, tmp_path):
    first, second = str(tmp_path / "a.tgz"), str(tmp_path / "other name.tgz")
    for address in (first, second):
        export_submission(root, address, competition="comp6")
    assert storage.read_bytes(first) == storage.read_bytes(second)
    assert storage.read_bytes(first)[3:8] == bytes(5)  # RFC 1952: no name, no time


def test_what_the_server_would_count_as_wrong_is_refused(root, tmp_path):
    address = str(tmp_path / "results.tgz")
    with pytest.raises(ValueError, match="comp5, comp6"):
        export_submission(root, address, competition="comp7")
    document = storage.read_json(storage.join(root, "index.json"))
    for change, message in (
        ({"num_rejects": 1, "reject_reasons": {"image is broken": 1}}, "1 images have no mask.*image is broken"),
        ({"void_pixels": 7}, "7 pixels of 255; label with label.min_confidence=0"),
    ):
        storage.write_json(storage.join(root, "index.json"), document | change)
        with pytest.raises(ValueError, match=message):
            export_submission(root, address, competition="comp6")
    assert not storage.exists(address)
