import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from pydensecrf.densecrf import DenseCRF2D
from torch.nn import functional

from dfa.label.crf import PRESETS, crf_labels, dense_crf
from dfa.label.scoring import ImageScores, LabelSettings, label_image, model_scores


def scene(num_classes, height=60, width=80, seed=0):
    """An image of flat noisy blocks, and soft probabilities that follow them only roughly."""
    random = np.random.default_rng(seed)
    blocks = random.permutation(np.arange(20) % num_classes).reshape(4, 5)
    truth = blocks[np.arange(height)[:, None] * 4 // height, np.arange(width) * 5 // width]
    colours = random.integers(0, 256, (num_classes, 3))
    image = np.clip(colours[truth] + random.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)
    logit = torch.from_numpy(3.0 * np.eye(num_classes)[truth]).permute(2, 0, 1)[None]
    logit = functional.avg_pool2d(logit, 9, stride=1, padding=4, count_include_pad=False)[0].numpy()
    probability = np.exp(logit + random.normal(0, 0.7, logit.shape))
    return image, (probability / probability.sum(axis=0)).astype(np.float32), truth


def slow_mean_field(image, probability, settings):
    """Exact mean field, float64, dense kernels, no lattice. Like the library it keeps a pixel's message to itself."""
    classes, height, width = probability.shape
    place = np.array([(y, x) for y in range(height) for x in range(width)], float)
    colour = image.reshape(-1, 3).astype(float)

    def kernel(features):
        dense = np.exp(-0.5 * ((features[:, None] - features[None]) ** 2).sum(axis=2))
        norm = 1 / np.sqrt(dense.sum(axis=1))
        return dense * norm[:, None] * norm[None]

    smooth = kernel(place / settings.gaussian_sxy)
    look = kernel(np.concatenate([place / settings.bilateral_sxy, colour / settings.bilateral_srgb], axis=1))
    unary = np.log(probability.reshape(classes, -1).astype(float))
    state = np.exp(unary)
    for _ in range(settings.iterations):
        score = unary + settings.gaussian_weight * state @ smooth + settings.bilateral_weight * state @ look
        state = np.exp(score - score.max(axis=0))
        state /= state.sum(axis=0)
    return state.reshape(probability.shape)


@pytest.mark.parametrize("name", PRESETS)
def test_the_result_is_the_library_called_directly(name):
    image, probability, _ = scene(3)
    settings = PRESETS[name]
    field = DenseCRF2D(80, 60, 3)
    unary = probability.reshape(3, -1) / probability.reshape(3, -1).sum(axis=0)  # so are ours normalised
    field.setUnaryEnergy(np.ascontiguousarray(-np.log(unary)))
    field.addPairwiseGaussian(sxy=settings.gaussian_sxy, compat=settings.gaussian_weight)
    field.addPairwiseBilateral(
        sxy=settings.bilateral_sxy, srgb=settings.bilateral_srgb, rgbim=image.copy(), compat=settings.bilateral_weight
    )
    expected = np.array(field.inference(settings.iterations)).reshape(3, 60, 80)
    result = dense_crf(image, probability, settings)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected)


def test_presets_are_the_published_settings():
    rows = {name: dataclasses.astuple(settings)[:6] for name, settings in PRESETS.items()}
    assert rows == {"deeplab": (10, 1, 3, 67, 3, 4), "smooth": (10, 3, 3, 64, 5, 4), "wide": (10, 1, 1, 121, 5, 4)}


def test_the_result_follows_exact_mean_field():
    image, probability, _ = scene(3, height=12, width=12, seed=2)
    gentle = {"gaussian_weight": 1, "bilateral_weight": 1.5, "bilateral_sxy": 3, "bilateral_srgb": 20, "iterations": 5}
    settings = dataclasses.replace(PRESETS["deeplab"], **gentle)
    result, exact = dense_crf(image, probability, settings), slow_mean_field(image, probability, settings)
    assert np.abs(exact - probability).mean() > 0.1  # what is compared is the work of the CRF, not its input
    # The permutohedral lattice approximates the Gaussian kernels: loose bounds (measured 0.005, 0.034 and 0.99).
    assert np.abs(result - exact).mean() < 0.015 and np.abs(result - exact).max() < 0.1
    assert (result.argmax(axis=0) == exact.argmax(axis=0)).mean() >= 0.95


def test_present_classes_alone_give_the_labels_of_all_classes():
    image, probability, _ = scene(3, height=120, width=160)
    everything = np.full((21, 120, 160), 1e-8, np.float32)
    everything[[0, 7, 15]] = probability
    all_labels = dense_crf(image, everything, PRESETS["deeplab"]).argmax(axis=0)
    few_labels = crf_labels(image, probability, (0, 7, 15), PRESETS["deeplab"])
    assert (all_labels == few_labels).mean() >= 0.999  # measured: 1.0; the two differ by the clip of 18 absent classes


def _photographs(sample_data, count=3):
    """Real photographs with rough probabilities of all 21 classes that follow their masks."""
    root = sample_data / "voc_mini/VOCdevkit/VOC2012"
    for number, path in enumerate(sorted((root / "SegmentationClassAug").glob("*.png"))[:count]):
        mask = Image.open(path)
        size = (mask.width // 2, mask.height // 2)
        picture = Image.open(root / f"JPEGImages/{path.stem}.jpg").convert("RGB").resize(size)
        truth = np.array(mask.resize(size, Image.Resampling.NEAREST)).astype(int)
        logit = torch.from_numpy(8.0 * np.eye(21)[np.where(truth == 255, 0, truth)]).permute(2, 0, 1)[None]
        noise = torch.randn(1, 21, size[1] // 8, size[0] // 8, generator=torch.Generator().manual_seed(number))
        logit = functional.avg_pool2d(logit, 21, stride=1, padding=10, count_include_pad=False)
        logit = logit + 1.5 * functional.interpolate(noise, logit.shape[2:], mode="bilinear").double()
        present = sorted(set(np.unique(truth).tolist()) - {0, 255})
        # A model hardly believes in most classes; here in some it does, wrongly.
        logit[:, [each for each in range(1, 21) if each not in present and each % 5]] -= 4
        yield np.asarray(picture), logit, present


def _library_alone(image, probability, settings):
    """pydensecrf on the rows as they are, clipped and normalised as its own documentation does."""
    field = DenseCRF2D(image.shape[1], image.shape[0], len(probability))
    probability = np.clip(probability, settings.min_probability, None).astype(np.float32)
    energy = -np.log(probability / probability.sum(0))
    field.setUnaryEnergy(np.ascontiguousarray(energy.reshape(len(probability), -1)))
    field.addPairwiseGaussian(sxy=settings.gaussian_sxy, compat=settings.gaussian_weight)
    field.addPairwiseBilateral(
        sxy=settings.bilateral_sxy, srgb=settings.bilateral_srgb, rgbim=image.copy(), compat=settings.bilateral_weight
    )
    return np.array(field.inference(settings.iterations)).reshape(probability.shape).argmax(0)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("unary", ["cam", "model"])
def test_on_photographs_a_few_classes_give_the_librarys_labels_of_all_21(name, unary, sample_data):
    """At least 99.9 % of the pixels: of a CAM's present classes, and of a model's classes that matter somewhere."""
    settings = LabelSettings(20, PRESETS[name], 1.0, 0.0, ())
    agreeing = total = 0
    for image, logit, present in _photographs(sample_data):
        if unary == "cam":
            scores_KHW = logit.softmax(1)[0].float().numpy()[[0, *present]]
            scores = ImageScores(scores_KHW, (0, *present))
            everything = np.zeros((21, *image.shape[:2]), np.float32)
            everything[[0, *present]] = scores_KHW
        else:
            (scores,) = model_scores(logit, min_probability=0.01)
            everything = logit.softmax(1)[0].float().numpy()
            assert len(scores.class_ids) < 21
        mask = label_image(image, scores, None, settings).mask_HW
        agreeing += int((mask == _library_alone(image, everything, settings.crf)).sum())
        total += mask.size
    assert agreeing >= 0.999 * total > 0


def test_the_crf_improves_rough_probabilities():
    image, probability, truth = scene(4)
    labels = crf_labels(image, probability, range(4), PRESETS["deeplab"])
    assert (labels == truth).mean() > (probability.argmax(axis=0) == truth).mean() + 0.02


def test_one_class_is_certain_and_needs_no_inference():
    image, _, _ = scene(2)
    assert (dense_crf(image, np.zeros((1, 60, 80), np.float32), PRESETS["deeplab"]) == 1).all()
    assert (crf_labels(image, np.zeros((1, 60, 80), np.float32), (0,), PRESETS["deeplab"]) == 0).all()


def test_views_read_only_memory_and_float64_are_accepted_and_left_alone():
    image, probability, _ = scene(3)
    expected = dense_crf(image, probability, PRESETS["deeplab"])
    flipped = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    strided = np.asfortranarray(probability.astype(np.float64))
    before = strided.copy()
    np.testing.assert_allclose(dense_crf(flipped, strided, PRESETS["deeplab"]), expected, atol=1e-4)
    assert (strided == before).all()
    image.setflags(write=False)  # as an image read by PIL is
    np.testing.assert_array_equal(dense_crf(image, probability, PRESETS["deeplab"]), expected)


def test_zero_iterations_return_the_normalised_input():
    image, probability, _ = scene(3)
    result = dense_crf(image, probability * 5, dataclasses.replace(PRESETS["deeplab"], iterations=0))
    np.testing.assert_allclose(result, probability, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1)])
def test_the_smallest_images_work(shape):
    result = dense_crf(np.zeros((*shape, 3), np.uint8), np.full((2, *shape), 0.5, np.float32), PRESETS["wide"])
    np.testing.assert_allclose(result, 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "probability", "message"),
    [
        (np.zeros((4, 5, 3), np.float32), np.ones((2, 4, 5), np.float32), "uint8"),
        (np.zeros((4, 5), np.uint8), np.ones((2, 4, 5), np.float32), "uint8"),
        (np.zeros((4, 5, 3), np.uint8), np.ones((2, 5, 4), np.float32), "do not fit"),
        (np.zeros((4, 5, 3), np.uint8), np.ones((0, 4, 5), np.float32), "at least one class"),
        (np.zeros((0, 5, 3), np.uint8), np.ones((2, 0, 5), np.float32), "one pixel"),
        (np.zeros((4, 5, 3), np.uint8), np.full((2, 4, 5), np.nan, np.float32), "finite"),
        (np.zeros((4, 5, 3), np.uint8), np.full((2, 4, 5), -1, np.float32), ">= 0"),
        # Broadcast views: a huge image without its memory.
        (np.broadcast_to(np.uint8(0), (20000, 20000, 3)), np.broadcast_to(np.float32(1), (2, 20000, 20000)), "32-bit"),
    ],
)
def test_bad_input_is_refused_before_the_library_sees_it(image, probability, message):
    with pytest.raises(ValueError, match=message):
        dense_crf(image, probability, PRESETS["deeplab"])


@pytest.mark.parametrize("ids", [(0, 1), (0, 1, 1), (0, 1, 32768), (-1, 0, 1)])
def test_class_ids_must_fit_the_rows_and_the_mask(ids):
    image, probability, _ = scene(3, height=4, width=4)
    with pytest.raises(ValueError, match="class ids"):
        crf_labels(image, probability, ids, PRESETS["deeplab"])


def test_settings_out_of_range_are_refused():
    for change in ({"iterations": -1}, {"bilateral_srgb": 0}, {"gaussian_weight": -1}, {"min_probability": 0}):
        with pytest.raises(ValueError, match="CRF"):
            dataclasses.replace(PRESETS["deeplab"], **change)
