"""Multi-scale inference: sizes, mirroring, merging."""

import pytest
import torch
import torch.nn.functional as F

from dfa.model.inference import InputSize, predict_together, size_class


def picture(height, width, batch=1):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)


def pooled(image):
    """A forward that sees position: patch colours, and patch colours weighted by column (not mirror-symmetric)."""
    patches = F.avg_pool2d(image, 8)
    return torch.cat([5 * patches, patches * torch.arange(patches.shape[-1])], dim=1)


def options(**changes):
    return {"scales": [1.0], "flip": False, "forward": pooled, "multiple_of": 8, "merge": "logits"} | changes


def predict_logits(image, **options):
    return predict_together([image], **options)[0]


def test_one_scale_of_a_fitting_image_is_the_forward_itself():
    image = picture(16, 24)
    expected = F.interpolate(pooled(image / 255), size=(16, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(predict_logits(image, **options()), expected)
    torch.testing.assert_close(predict_logits(image / 255, **options()), expected)


@pytest.mark.parametrize("merge", ["logits", "max"])
def test_scales_and_mirrored_copies_are_merged(merge):
    image, scales, views = picture(21, 35, batch=2), [0.5, 1.0, 1.6], []
    sizes = [(8, 16), (24, 32), (32, 56)]
    for size in sizes:
        resized = image / 255
        resized = F.interpolate(resized, size=size, mode="bilinear", align_corners=False, antialias=True)
        for mirrored in (False, True):
            logits = pooled(resized.flip(3) if mirrored else resized)
            logits = F.interpolate(logits.flip(3) if mirrored else logits, size=(21, 35), mode="bilinear")
            views.append(logits)
    expected = torch.stack(views).amax(0) if merge == "max" else sum(views) / len(views)
    got = predict_logits(image, **options(scales=scales, flip=True, merge=merge))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("input_size", "seen"),
    [
        (InputSize("square", 32), [(32, 32), (48, 48)]),
        (InputSize("long_side", 40), [(24, 40), (32, 64)]),  # 22.5 x 40 and 33.8 x 60, to multiples of 8
        (InputSize(), [(48, 80), (64, 120)]),  # 45 x 80; 67.5 x 120
    ],
)
def test_an_input_size_is_what_the_forward_meets_and_the_answer_keeps_the_images_own(input_size, seen):
    image, met = picture(45, 80), []

    def forward(view):
        met.append(tuple(view.shape[-2:]))
        return pooled(view)

    got = predict_logits(image, **options(forward=forward, scales=[1.0, 1.5], input_size=input_size))
    assert met == seen and got.shape == (1, 6, 45, 80)
    assert size_class(45, 80, scales=[1.0, 1.5], multiple_of=8, input_size=input_size) == tuple(seen)


def test_squares_of_many_sizes_share_a_size_class():
    options = {"scales": [1.0, 1.2], "multiple_of": 16, "input_size": InputSize("square", 320)}
    assert size_class(500, 375, **options) == size_class(100, 333, **options) == ((320, 320), (384, 384))


@pytest.mark.parametrize("kind", ["native", "square", "long_side"])
def test_a_picture_whose_header_cannot_be_read_has_a_size_class_too(kind):
    """It is listed with the size 0 x 0, and whoever decodes it says what it is."""
    assert (
        len(size_class(0, 0, scales=[1.0], multiple_of=8, input_size=InputSize(kind, 0 if kind == "native" else 64)))
        == 1
    )


def test_an_input_size_without_pixels_or_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="needs pixels"):
        InputSize("square")
    with pytest.raises(ValueError, match="native, square, long_side"):
        InputSize("short_side", 3)  # type: ignore[arg-type]


def test_mirroring_makes_the_answer_commute_with_a_mirrored_image():
    image = picture(16, 40)
    mirrored = predict_logits(image.flip(3), **options(flip=True))
    torch.testing.assert_close(mirrored.flip(3), predict_logits(image, **options(flip=True)))
    plain = predict_logits(image.flip(3), **options()).flip(3)
    assert not torch.allclose(plain, predict_logits(image, **options()))


def test_the_forward_meets_multiples_of_the_patch_whatever_the_image():
    seen = []

    def forward(image):
        seen.append(tuple(image.shape))
        assert image.min() >= 0 and image.max() <= 1
        return pooled(image)

    images = [picture(3, 500), picture(37, 16)]
    got = [predict_logits(image, **options(forward=forward, flip=True, scales=[1.0, 1.5])) for image in images]
    assert seen == [(2, 3, 8, 496), (2, 3, 8, 752), (2, 3, 40, 16), (2, 3, 56, 24)]
    assert [tuple(logits.shape) for logits in got] == [(1, 6, 3, 500), (1, 6, 37, 16)]


def test_many_classes_are_upsampled_in_parts_without_loss():
    def forward(image):
        return torch.arange(70.0).view(1, 70, 1, 1) + F.avg_pool2d(image, 8)[:, :1]

    got = predict_logits(picture(16, 16), **options(forward=forward))
    torch.testing.assert_close(got - got[:, :1], torch.arange(70.0).view(1, 70, 1, 1).expand_as(got))


def test_half_precision_logits_of_impossible_classes_are_merged_in_fp32():
    def forward(image):
        return torch.tensor([-60000.0, 60000.0]).view(1, 2, 1, 1).expand(len(image), 2, 1, 1).half()

    got = predict_logits(
        picture(8, 8), **options(forward=forward, flip=True, scales=[1.0, 2.0])
    )  # halves would overflow
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor([-6e4, 6e4]).half().float().view(1, 2, 1, 1).expand_as(got))


@pytest.mark.parametrize(
    "change, message", [({"scales": []}, "scales"), ({"scales": [0]}, "scales"), ({"merge": "min"}, "min")]
)
def test_bad_options_are_told(change, message):
    with pytest.raises(ValueError, match=message):
        predict_logits(picture(8, 8), **options(**change))
