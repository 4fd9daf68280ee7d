"""`dfa.load(checkpoint).predict(image)`: against the parts that it is made of, on a small model with random weights."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pydensecrf.densecrf import DenseCRF2D

import dfa
from dfa import build
from dfa.config import load
from dfa.label.crf import PRESETS
from dfa.model import predictor
from dfa.train.checkpoint import (
    CheckpointInfo,
    CorruptCheckpointError,
    find_checkpoint,
    load_weights,
    save_checkpoint,
)
from dfa.train.objective import EngineState

CPU = torch.device("cpu")
CLASSES = build.class_set(load("demo")).names
ONE = {"scales": (1.0,), "flip": False}


def save_run(config, *, step=1, miou=None, seed=0, description=None):
    """An untrained student whose classes 4 and above hardly ever appear, as checkpoint STEP of the run."""
    config.train.seed = seed
    student = build.segmenter(config, CPU).student
    with torch.no_grad():
        student.decoder.classify.weight *= 20
        student.decoder.classify.bias[4:] -= 40
    weights = {f"student.{name}": value.contiguous() for name, value in student.state_dict().items()}
    info = CheckpointInfo(
        step, 0, 0, miou, 0, 1.0, CLASSES, build.model_description(config) if description is None else description
    )
    return save_checkpoint(Path(config.run), EngineState(weights, {}, {}, 0, 1.0), {}, info)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of the demo's kind: its tiny CLIP, and two checkpoints of which the first scored better."""
    run = tmp_path_factory.mktemp("predictor") / "run"
    config = load("demo", [f"run={run}", "decoder.width=32", "decoder.depth=1"])
    save_run(config, step=1, miou=0.5, seed=3)
    save_run(config, step=2, miou=0.4, seed=4)
    return config


@pytest.fixture(scope="module")
def model(config):
    return dfa.load(config.run, **ONE)


def picture(height=60, width=75, seed=0):
    """Blocks of colour with noise."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 20 + 1, width // 20 + 1, 3))
    large = np.kron(blocks, np.ones((20, 20, 1)))[:height, :width]
    return np.clip(large + rng.normal(0, 5, large.shape), 0, 255).astype(np.uint8)


def test_averaged_weights_are_taken_where_there_are_any_unless_told_otherwise(config, tmp_path):
    """Checkpoint 1 holds seed 3's weights and seed 4's as their average: each choice must answer as that seed alone."""
    other, wanted = copy.deepcopy(config), {}
    for seed in (3, 4):
        other.run = str(tmp_path / str(seed))
        save_run(other, step=1, seed=seed)
        wanted[seed] = dfa.load(other.run, **ONE).predict(picture()).scores
    both = copy.deepcopy(config)
    both.run = str(tmp_path / "both")
    weights, info = load_weights(save_run(both, step=1, seed=3), class_names=None)
    average, _ = load_weights(find_checkpoint(str(tmp_path / "4"), "latest"), class_names=None)
    save_checkpoint(both.run, EngineState(weights, {}, {}, 0, 1.0), {}, info, average)
    for kind, seed in (("auto", 4), ("average", 4), ("trained", 3)):
        found = dfa.load(both.run, **ONE, weights=kind).predict(picture()).scores
        np.testing.assert_array_equal(found, wanted[seed])
    passes = []
    (tmp_path / "photos").mkdir()
    Image.fromarray(picture()).save(tmp_path / "photos/one.png")
    both.predict.input = str(tmp_path / "photos")
    for both.label.weights in ("auto", "average", "trained"):
        passes.append(build.predict_pass(both).hash)
    assert passes[0] == passes[1] != passes[2]  # masks of one are not taken for the other's
    with pytest.raises(ValueError, match="has no averaged weights"):
        dfa.load(other.run, weights="average")


def test_masks_need_none_of_the_others(config, tmp_path):
    single = copy.deepcopy(config)
    single.run = str(tmp_path / "single")
    save_run(single, seed=3)
    wanted = dfa.load(single.run, **ONE).predict(picture()).scores
    single.run, description = str(tmp_path / "several"), build.model_description(single)
    description["clip"]["others"] = ["conf/tiny_clip.json@gone.safetensors"]
    save_run(single, seed=3, description=description)
    np.testing.assert_array_equal(dfa.load(single.run, **ONE).predict(picture()).scores, wanted)


def test_scores_are_the_softmax_of_the_segmenters_logits(config, model):
    config.label.checkpoint = "best"
    segmenter = build.trained_segmenter(config, CPU, "best")
    image_HW3 = picture()
    for options in (ONE, {"scales": (0.7, 1.5), "flip": True}):
        mask_HW, scores_CHW = model.predict(image_HW3, **options)
        batch = torch.from_numpy(image_HW3).permute(2, 0, 1)[None]
        logits = segmenter.logits(batch, **options)[0].double().numpy()
        expected = np.exp(logits) / np.exp(logits).sum(0)
        np.testing.assert_allclose(scores_CHW, expected, atol=1e-6)  # float32 exponentials
        assert (mask_HW == scores_CHW.argmax(0)).all()
        assert (mask_HW.dtype, scores_CHW.dtype) == (np.uint8, np.float32)
        assert len(np.unique(mask_HW)) > 1


def test_the_predictors_own_scales_and_flip_hold_where_none_are_given(config, model):
    usual = dfa.load(config.run)
    image = picture(40, 30)
    wanted = model.predict(image, scales=(1.0, 1.2, 1.5), flip=True)
    assert (usual.predict(image).scores == wanted.scores).all()
    assert not (model.predict(image).scores == wanted.scores).all()
    # An explicit False and one scale are answers, not absences.
    assert (usual.predict(image, scales=[1.0], flip=False).scores == model.predict(image).scores).all()


def test_a_long_side_is_the_scale_that_brings_an_image_to_it(config, model):
    image, small = picture(120, 150), dfa.load(config.run, long_side=75, **ONE)
    np.testing.assert_array_equal(small.predict(image).scores, model.predict(image, scales=(0.5,)).scores)
    with pytest.raises(ValueError, match="long_side needs pixels, given 0"):
        dfa.load(config.run, long_side=0)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (300, 2), (7, 5), (61, 77), (1500, 10)])
@pytest.mark.parametrize("crf", [None, PRESETS["deeplab"]])
def test_any_size_gives_probabilities_at_its_own_size(model, size, crf):
    mask_HW, scores_CHW = model.predict(picture(*size), crf=crf, scales=(1.0, 1.5))
    assert mask_HW.shape == size
    assert scores_CHW.shape == (len(CLASSES) + 1, *size)
    np.testing.assert_allclose(scores_CHW.sum(0), 1, atol=1e-5)  # float32 sums of eleven
    assert scores_CHW.min() >= 0


def _of_mode(mode):
    grey = picture()[:, :, 0]
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 256 + 77)
    return Image.fromarray(grey) if mode == "L" else Image.fromarray(picture()).convert(mode)


@pytest.mark.parametrize(
    ("mode", "extension"),
    [("RGB", "png"), ("RGB", "jpg"), ("L", "png"), ("P", "png"), ("RGBA", "png"), ("I;16", "png"), ("CMYK", "jpg")],
)
def test_a_path_a_picture_and_its_pixels_are_one_image(model, tmp_path, mode, extension):
    path = tmp_path / f"image.{extension}"
    _of_mode(mode).save(path)
    opened = Image.open(path)
    by_hand = np.asarray(opened) // 256 if mode == "I;16" else np.asarray(opened.convert("RGB"))
    pixels = np.stack([by_hand] * 3, -1).astype(np.uint8) if mode == "I;16" else by_hand
    expected = model.predict(pixels).scores
    for image in (str(path), path, Image.open(path)):
        assert (model.predict(image).scores == expected).all()


def test_pixels_are_taken_as_they_are_stored_and_a_warning_counts_what_viewers_turn(model, tmp_path, caplog):
    exif = Image.Exif()
    exif[274] = 6
    path = tmp_path / "turned.jpg"
    Image.fromarray(picture(30, 50)).save(path, exif=exif)
    found = model.predict_batch([path, Image.open(path), picture(30, 50)])
    assert [each.mask.shape for each in found] == [(30, 50)] * 3
    assert "2 of 3 images carry an EXIF orientation" in caplog.text
    caplog.clear()
    assert model.predict(ImageOps.exif_transpose(Image.open(path))).mask.shape == (50, 30)
    assert not caplog.text


@pytest.mark.filterwarnings("error")
def test_transparency_is_dropped_without_a_word(model, tmp_path):
    picture_of_four = Image.fromarray(picture()).quantize(4)
    picture_of_four.save(tmp_path / "palette.png", transparency=bytes([0, 128, 255, 7]))
    expected = model.predict(np.array(picture_of_four.convert("RGB"))).scores
    assert (model.predict(tmp_path / "palette.png").scores == expected).all()


def test_a_preset_may_be_given_by_its_name(model):
    image = picture(40, 30)
    assert (model.predict(image, crf="smooth").scores == model.predict(image, crf=PRESETS["smooth"]).scores).all()
    with pytest.raises(ValueError, match=r"crf is 'deplab'; allowed are None, 'deeplab', .*did you mean 'deeplab'"):
        model.predict(image, crf="deplab")
    with pytest.raises(ValueError, match=r"crf is True; allowed are None, 'deeplab'"):
        model.predict(image, crf=True)


@pytest.mark.parametrize("scales", [1.0, (), "1.0", (0.0,), (1.0, -1.0), (float("nan"),), ("large",)])
def test_scales_that_are_no_list_of_factors_are_refused(config, model, scales):
    with pytest.raises(ValueError, match=r"scales is .*allowed is a list of factors above 0, such as \(1\.0,\)"):
        model.predict(picture(20, 20), scales=scales)
    with pytest.raises(ValueError, match="scales is"):
        dfa.load(config.run, scales=scales)


def test_one_image_is_no_batch(model, tmp_path):
    for image in (str(tmp_path / "a.jpg"), tmp_path / "a.jpg", Image.new("RGB", (4, 4))):
        with pytest.raises(ValueError, match="predict_batch takes a list of images"):
            model.predict_batch(image)


def test_a_batch_is_each_image_by_itself(model, monkeypatch):
    monkeypatch.setattr(predictor, "_BATCH_PIXELS", 2 * 40 * 56)
    images = [picture(40, 56, 1), picture(24, 24, 2), picture(40, 56, 3), picture(80, 90, 4), picture(40, 56, 5)]
    found = model.predict_batch(images)
    assert [each.mask.shape for each in found] == [each.shape[:2] for each in images]
    for image, each in zip(images, found, strict=True):
        np.testing.assert_allclose(each.scores, model.predict(image).scores, atol=1e-5)  # batched products round
    assert model.predict_batch([]) == []


def test_images_of_one_size_share_a_pass_up_to_a_million_pixels():
    sizes = [(500, 400), (40, 40), (500, 400), (2000, 2000)] + [(500, 400)] * 5
    batches = list(predictor._batches(sizes, max_pixels=1_000_000))
    assert sorted(place for batch in batches for place in batch) == list(range(9))
    assert all(len({sizes[place] for place in batch}) == 1 for batch in batches)
    assert [len(batch) for batch in batches] == [5, 2, 1, 1]


def test_the_crf_of_few_classes_decides_as_the_librarys_own_of_all(model):
    image_HW3 = picture(100, 120)
    plain = model.predict(image_HW3)
    mask_HW, scores_CHW = model.predict(image_HW3, crf=PRESETS["deeplab"])
    field = DenseCRF2D(120, 100, len(CLASSES) + 1)
    field.setUnaryEnergy(np.ascontiguousarray(-np.log(np.clip(plain.scores, 1e-5, 1)).reshape(len(CLASSES) + 1, -1)))
    field.addPairwiseGaussian(sxy=1, compat=3)
    field.addPairwiseBilateral(sxy=67, srgb=3, rgbim=image_HW3, compat=4)
    expected_CHW = np.array(field.inference(10)).reshape(plain.scores.shape)
    assert (mask_HW == expected_CHW.argmax(0)).mean() >= 0.999
    assert (mask_HW != plain.mask).mean() > 0.01
    np.testing.assert_allclose(scores_CHW, expected_CHW, atol=0.01)
    assert not scores_CHW[4:].any()  # classes that exceed 0.01 nowhere took no part
    assert plain.scores[4:].max() < 0.01


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)],
)
def test_arrays_of_another_kind_are_refused(model, image):
    with pytest.raises(ValueError, match=r"an array must be uint8 \(H, W, 3\)") as error:
        model.predict(image)
    assert str(image.shape) in str(error.value)


def test_files_that_do_not_decode_are_named(model, tmp_path):
    (tmp_path / "note.jpg").write_bytes(b"no image at all")
    with pytest.raises(ValueError, match=r"note\.jpg: not a JPEG or PNG"):
        model.predict(tmp_path / "note.jpg")
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg"):
        model.predict(tmp_path / "absent.jpg")
    with pytest.raises(ValueError, match="image is a list; allowed are a path"):
        model.predict([1, 2])


def test_pictures_beyond_the_limit_are_refused_before_they_are_decoded(model, tmp_path, monkeypatch):
    Image.fromarray(picture(100, 120)).save(tmp_path / "large.png")
    data = (tmp_path / "large.png").read_bytes()
    (tmp_path / "large.png").write_bytes(data[: len(data) // 2])  # decoding would complain of this
    monkeypatch.setattr(model, "max_pixels", 11_999)
    for image in (tmp_path / "large.png", Image.open(tmp_path / "large.png"), np.zeros((100, 120, 3), np.uint8)):
        with pytest.raises(ValueError, match="120 x 100 = 12000 pixels, more than"):
            model.predict(image)


def test_names_and_colours_come_with_the_model(model):
    assert model.class_names == CLASSES
    # aeroplane, person and void of PASCAL VOC
    assert [tuple(model.palette[value]) for value in (0, 1, 15, 255)] == [
        (0, 0, 0),
        (128, 0, 0),
        (192, 128, 128),
        (224, 224, 192),
    ]


def test_a_run_stands_for_its_best_checkpoint(config, model):
    root, image = Path(config.run) / "checkpoints", picture(40, 40)
    best = model.predict(image).scores
    assert (dfa.load(root / "step-00000001", **ONE).predict(image).scores == best).all()
    assert not (dfa.load(root / "step-00000002", **ONE).predict(image).scores == best).all()


def test_the_checkpoint_alone_is_enough_in_any_working_directory(config, model, tmp_path, monkeypatch):
    moved = shutil.copytree(Path(config.run) / "checkpoints/step-00000001", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    image = picture(40, 40)
    assert (dfa.load("model", **ONE).predict(image).scores == model.predict(image).scores).all()
    assert moved.is_dir()


def test_what_is_no_checkpoint_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no folder with .* in it; give a checkpoint's folder"):
        dfa.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is no folder with state\.json or checkpoints/"):
        dfa.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds no finished checkpoint"):
        dfa.load(tmp_path)
    best = Path(config.run) / "checkpoints/step-00000001"
    with pytest.raises(ValueError, match=r"model\.safetensors is no folder"):
        dfa.load(best / "model.safetensors")


@pytest.mark.parametrize("device", ["gpu", *([] if torch.cuda.is_available() else ["cuda", "cuda:1"])])
def test_a_device_that_is_not_there_is_refused_by_its_name(config, model, device):
    with pytest.raises(ValueError, match=f"device='{device}'.*; give cpu"):
        dfa.load(Path(config.run), device=device)


def test_changed_files_are_refused(config, tmp_path):
    copy = shutil.copytree(Path(config.run) / "checkpoints/step-00000001", tmp_path / "copy")
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors is damaged"):
        dfa.load(copy)
    state = json.loads((copy / "state.json").read_text())
    state["class_names"][0] = "other"
    (copy / "state.json").write_text(json.dumps(state))
    with pytest.raises(CorruptCheckpointError, match="was changed after it was written"):
        dfa.load(copy)


@pytest.fixture
def described(config, tmp_path):
    """Saves a checkpoint with a changed model description."""

    def save(change):
        description = build.model_description(config)
        change(description)
        other = load("demo", [f"run={tmp_path}/other", "decoder.width=32", "decoder.depth=1"])
        return save_run(other, description=description)

    return save


def test_a_checkpoint_from_before_a_setting_has_its_default(described):
    def older(description):
        assert "use_from_step" not in description["affinity"]  # it decides about labels, not about weights
        for name in ("heads", "high_prior", "encoder", "encoder_checkpoint", "encoder_blocks"):
            del description["affinity"][name]

    assert dfa.load(described(older), **ONE) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["decoder"].update(rotary=True), r"another version of dfa: decoder\.rotary is unknown here"),
        (lambda d: d["clip"].pop("mean"), r"another version of dfa: clip\.mean is missing"),
        (lambda d: d.pop("affinity"), r"affinity\.clip is missing, .*; use that version, or train again"),
        (lambda d: d["decoder"].update(width="wide"), r"checkpoint .*step-00000001: .*'wide'"),
        (lambda d: d["decoder"].update(width=4), r"decoder\.width is 4, allowed is 8 to 4096"),
        (lambda d: d["decoder"].update(width=64), "does not fit this configuration's decoder"),
    ],
)
def test_descriptions_that_this_version_cannot_build_are_refused(described, change, message):
    with pytest.raises(ValueError, match=message):
        dfa.load(described(change))


def test_a_checkpoint_from_before_a_field_is_the_model_without_it(described):
    later = {"clip": ["others"], "affinity": ["encoder", "encoder_blocks"], "decoder": ["mixer", "grid"]}

    def older(description):
        for section, names in later.items():
            for name in names:
                del description[section][name]

    now = dfa.load(described(lambda d: None), **ONE).predict(picture()).scores
    assert (dfa.load(described(older), **ONE).predict(picture()).scores == now).all()


def test_clip_files_that_are_gone_are_named_and_can_be_given(described, model):
    folder = described(lambda d: d["clip"].update(checkpoint="weights/mine.safetensors", model="weights/mine.json"))
    with pytest.raises(ValueError, match=r"clip\.checkpoint=weights/mine\.safetensors.*give its place as clip_checkp"):
        dfa.load(folder)
    project = Path(dfa.__file__).parent.parent
    weights = project / "dfa/world/tiny_clip.safetensors"
    with pytest.raises(ValueError, match=r"clip\.model=weights/mine\.json.*give its place as clip_model="):
        dfa.load(folder, clip_checkpoint=weights)
    given = dfa.load(folder, clip_checkpoint=weights, clip_model=project / "conf/tiny_clip.json", **ONE)
    assert given.predict(picture(16, 16)).mask.shape == (16, 16)
    assert given.class_names == model.class_names


def test_importing_dfa_is_free():
    code = "import sys, dfa; print([m for m in ('torch', 'numpy', 'PIL', 'open_clip') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
