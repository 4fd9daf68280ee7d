"""Multi-scale inference: sizes, mirroring, merging."""

import pytest
import torch
import torch.nn.functional as F

from dfa.model.inference import predict_logits


def picture(height, width, batch=1):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)


def pooled(image):
    """A forward that sees position: patch colours, and patch colours weighted by column (not mirror-symmetric)."""
    patches = F.avg_pool2d(image, 8)
    return torch.cat([5 * patches, patches * torch.arange(patches.shape[-1])], dim=1)


def options(**changes):
    return {"scales": [1.0], "flip": False, "forward": pooled, "multiple_of": 8, "merge": "logits"} | changes


def test_one_scale_of_a_fitting_image_is_the_forward_itself():
    image = picture(16, 24)
    expected = F.interpolate(pooled(image / 255), size=(16, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(predict_logits(image, **options()), expected)
    torch.testing.assert_close(predict_logits(image / 255, **options()), expected)


@pytest.mark.parametrize("merge", ["logits", "probabilities"])
def test_scales_and_mirrored_copies_are_averaged(merge):
    image, scales, views = picture(21, 35, batch=2), [0.5, 1.0, 1.6], []
    sizes = [(8, 16), (24, 32), (32, 56)]
    for size in sizes:
        resized = image / 255
        resized = F.interpolate(resized, size=size, mode="bilinear", align_corners=False, antialias=True)
        for mirrored in (False, True):
            logits = pooled(resized.flip(3) if mirrored else resized)
            logits = F.interpolate(logits.flip(3) if mirrored else logits, size=(21, 35), mode="bilinear")
            views.append(logits if merge == "logits" else logits.softmax(1))
    expected = sum(views) / len(views)
    got = predict_logits(image, **options(scales=scales, flip=True, merge=merge))
    torch.testing.assert_close(got, expected if merge == "logits" else expected.log())


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
    got = predict_logits(images, **options(forward=forward, flip=True, scales=[1.0, 1.5]))
    assert seen == [(2, 3, 8, 496), (2, 3, 8, 752), (2, 3, 40, 16), (2, 3, 56, 24)]
    assert [tuple(logits.shape) for logits in got] == [(1, 6, 3, 500), (1, 6, 37, 16)]


def test_many_classes_are_upsampled_in_parts_without_loss():
    def forward(image):
        return torch.arange(70.0).view(1, 70, 1, 1) + F.avg_pool2d(image, 8)[:, :1]

    got = predict_logits(picture(16, 16), **options(forward=forward))
    torch.testing.assert_close(got - got[:, :1], torch.arange(70.0).view(1, 70, 1, 1).expand_as(got))


def test_half_precision_logits_and_impossible_classes_stay_finite():
    def forward(image):
        return torch.tensor([-60000.0, 60000.0]).view(1, 2, 1, 1).expand(len(image), 2, 1, 1).half()

    got = predict_logits(picture(8, 8), **options(forward=forward, merge="probabilities"))
    assert got.dtype == torch.float32 and got.isfinite().all()


@pytest.mark.parametrize(
    "change, message", [({"scales": []}, "scales"), ({"scales": [0]}, "scales"), ({"merge": "max"}, "max")]
)
def test_bad_options_are_told(change, message):
    with pytest.raises(ValueError, match=message):
        predict_logits(picture(8, 8), **options(**change))
