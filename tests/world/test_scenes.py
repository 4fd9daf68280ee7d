import hashlib

import numpy as np
import pytest

from dfa.data.classes import ClassSet
from dfa.data.sources import Sample, VocSource, mask_array
from dfa.data.transforms import decode_rgb
from dfa.world import scenes
from dfa.world.folder import write_voc
from dfa.world.scenes import BACKGROUNDS, CLASSES, draw, draw_close_up


def test_a_scene_is_a_pure_function_of_seed_and_index():
    first = draw(3, 17)
    draw(3, 18)
    again = draw(3, 17)
    assert np.array_equal(first.image_HW3, again.image_HW3) and np.array_equal(first.mask_HW, again.mask_HW)
    others = [draw(3, 18), draw(4, 17)]
    assert not any(np.array_equal(first.image_HW3, other.image_HW3) for other in others)


def test_labels_are_exactly_the_classes_of_the_mask():
    for index in range(60):
        scene = draw(5, index)
        assert tuple(np.unique(scene.mask_HW[scene.mask_HW > 0])) == scene.labels
        assert 1 <= len(scene.labels) <= 3


def test_all_classes_backgrounds_and_object_counts_occur():
    drawn = [draw(6, index) for index in range(150)]
    assert {label for scene in drawn for label in scene.labels} == set(range(1, len(CLASSES) + 1))
    assert {scene.background for scene in drawn} == set(BACKGROUNDS)
    assert {len(scene.labels) for scene in drawn} == {1, 2, 3}


def test_the_body_of_an_object_is_plain_and_its_part_is_not():
    # Outside the part a body's colour varies by shade and noise only; inside it two colours alternate.
    rng = np.random.default_rng(0)
    for name in CLASSES:
        placed = scenes._place(name, rng, scenes.SIZE)
        body = placed.inside & ~placed.part
        shades = placed.colour[body] / placed.colour[body].mean(0)
        assert shades.std(0).max() < 0.2
        assert placed.colour[placed.part].std(0).max() > 25
        assert 0.08 < placed.part.sum() / placed.inside.sum() < 0.6


def test_occluded_objects_keep_their_part():
    owner = np.zeros((4, 4), np.uint8)
    owner[:2] = 1
    part = np.zeros((4, 4), bool)
    part[0] = True
    assert scenes._still_recognisable(owner, [part], [8])
    owner[0] = 0
    assert not scenes._still_recognisable(owner, [part], [8])


def test_a_caption_names_classes_and_background():
    scene = draw(5, 0)
    words = scene.caption.split()
    assert all(CLASSES[label - 1] in words for label in scene.labels)
    assert scene.background in words


def test_a_close_up_shows_one_object():
    for index in range(20):
        scene = draw_close_up(1, index)
        assert len(scene.labels) == 1 and scene.image_HW3.shape == (64, 64, 3)


@pytest.fixture
def classes():
    return ClassSet.from_mapping({"names": list(CLASSES), "background": list(BACKGROUNDS), "templates": ["{}"]})


def test_the_voc_reader_reads_the_world_with_exact_masks(tmp_path, classes):
    root = write_voc(tmp_path, seed=2, num_train=3, num_val=2)
    train = list(VocSource(str(root), "train", classes, masks="SegmentationClass"))
    val = list(VocSource(str(root), "val", classes))
    assert len(train) == 3 and len(val) == 2
    for index, sample in enumerate(train):
        scene = draw(2, index)
        assert isinstance(sample, Sample) and sample.labels == scene.labels
        assert np.array_equal(mask_array(sample, num_classes=10), scene.mask_HW)
        with open(sample.image, "rb") as file:
            decoded = decode_rgb(file.read(), max_pixels=10**6).astype(int)
        assert np.abs(decoded - scene.image_HW3).mean() < 4  # JPEG of quality 95


def _digests(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_interrupted_world_is_drawn_again_to_the_same_bytes(tmp_path):
    write_voc(tmp_path, seed=2, num_train=2, num_val=1)
    before = _digests(tmp_path)
    (tmp_path / "world.json").unlink()
    next((tmp_path / "VOC2012/JPEGImages").iterdir()).write_bytes(b"half")
    write_voc(tmp_path, seed=2, num_train=2, num_val=1)
    assert _digests(tmp_path) == before


def test_a_world_of_other_settings_is_refused(tmp_path):
    write_voc(tmp_path, seed=2, num_train=1, num_val=1)
    with pytest.raises(ValueError, match="other settings"):
        write_voc(tmp_path, seed=3, num_train=1, num_val=1)
