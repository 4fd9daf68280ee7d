import numpy as np
import ot
import pytest
import torch

from dfa.config import load
from dfa.label.seed import Affinities, SeedSettings, column_mask, make_seeds
from tests.label.known_similarity import STAGES, miou_by_threshold, read_pictures
from tests.label.known_similarity import affinities as affinities_of
from tests.label.known_similarity import similarity as similarity_of

DEFAULTS = {
    "generator": "transport",
    "scale": 5.0,
    "propagation": 1,
    "lambda_low": 1.0,
    "lambda_high": 0.1,
    "form": "propagate",
    "columns": "prompts",
    "constant": 0.5,
    "marginal": "softmax_mean",
    "marginal_temperature": 0.5,
    "epsilon": 0.1,
    "max_iterations": 200,
    "tolerance": 1e-6,
    "normalization": "column",
}


def settings(**changes):
    return SeedSettings(**{**DEFAULTS, **changes})


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(2, 12, 7, generator=generator) * 2 - 1
    labels = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)  # 4 classes, 3 background prompts

    def doubly_stochastic():
        weight = torch.rand(2, 12, 12, generator=generator) + 0.05
        for _ in range(60):
            weight = weight / weight.sum(-1, keepdim=True)
            weight = weight / weight.sum(-2, keepdim=True)
        return 0.5 * (weight + weight.mT)

    affinities = Affinities(doubly_stochastic(), doubly_stochastic(), torch.rand(2, 12, generator=generator))
    return similarity, labels, affinities


def _scores(similarity, columns, scale):
    logit = scale * similarity[:, columns].astype(np.float64)
    share = np.exp(logit) / np.exp(logit).sum(1, keepdims=True)
    return share / share.max(0)


def _min_max(values):
    return (values - values.min(0)) / (values.max(0) - values.min(0))


def test_transport_seeds_equal_an_independent_solution(problem):
    similarity, labels, affinities = problem
    seeds = make_seeds(similarity, labels, affinities, settings())
    for b in range(2):
        present = [k for k in range(4) if labels[b, k]]
        columns = [*present, 4, 5, 6]
        score = _scores(similarity[b].numpy(), columns, 5.0)
        low, high = affinities.low_BNN[b].double().numpy(), affinities.high_BNN[b].double().numpy()
        scoring = _min_max(low @ score) + 0.1 * _min_max(high @ score)
        x = score.mean(0) / 0.5
        marginal = np.exp(x) / np.exp(x).sum()
        plan = ot.sinkhorn(np.full(12, 1 / 12), marginal, -scoring, 0.1, stopThr=1e-12, numItermax=100_000)
        cam = plan / plan.max(0)
        # fp32 against fp64, and a marginal error of 1e-6
        assert np.allclose(seeds.cam_BNC[b][:, present].numpy(), cam[:, : len(present)], atol=2e-4)
        assert np.allclose(seeds.background_BN[b].numpy(), cam[:, len(present) :].max(1), atol=2e-4)


def test_absent_classes_are_zero_and_present_ones_reach_one(problem):
    similarity, labels, affinities = problem
    for generator in ("similarity", "affinity", "elementwise", "transport"):
        cam = make_seeds(similarity, labels, affinities, settings(generator=generator)).cam_BNC
        assert (cam.amax(1)[labels] == 1).all(), generator
        assert (cam.amax(1)[~labels] == 0).all(), generator


def test_the_default_transport_equals_an_independent_solution_and_gives_posteriors(problem):
    similarity, labels, affinities = problem
    chosen = {"columns": "strongest", "marginal": "area", "marginal_temperature": 0.2, "normalization": "row"}
    seeds = make_seeds(similarity, labels, affinities, settings(**chosen))
    for b in range(2):
        present, cosine = [k for k in range(4) if labels[b, k]], similarity[b].double().numpy()
        classes = _scores(similarity[b].numpy(), [*present, 4, 5, 6], 5.0)[:, : len(present)]
        background = 1 / (1 + np.exp(5.0 * (cosine[:, present].max(1) - cosine[:, 4:].max(1))))
        score = np.concatenate([classes, (background / background.max())[:, None]], axis=1)
        low, high = (each[b].double().numpy() for each in (affinities.low_BNN, affinities.high_BNN))
        smooth = _min_max(low @ score)
        weight = np.exp(smooth / 0.2)
        marginal = (weight / weight.sum(1, keepdims=True)).mean(0)
        scoring = smooth + 0.1 * _min_max(high @ score)
        plan = ot.sinkhorn(np.full(12, 1 / 12), marginal, -scoring, 0.1, stopThr=1e-12, numItermax=100_000)
        share = plan / plan.sum(1, keepdims=True)
        # fp32 against fp64, and a marginal error of 1e-6
        assert np.allclose(seeds.cam_BNC[b][:, present].numpy(), share[:, :-1], atol=2e-4)
        assert np.allclose(seeds.background_BN[b].numpy(), share[:, -1], atol=2e-4)
    total_BN = seeds.cam_BNC.sum(-1) + seeds.background_BN
    assert torch.allclose(total_BN, torch.ones(2, 12), atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_cosines_that_are_not_finite_are_refused_with_their_image(problem, bad):
    similarity, labels, affinities = problem
    similarity[1, 3, 1] = bad  # a class that the second image shows, and the first does not
    with pytest.raises(ValueError, match="image 1 of the batch: cosines of patches and texts must be finite"):
        make_seeds(similarity, labels, affinities, settings())


def test_the_maps_of_a_patch_sum_to_one_with_a_column_for_each_prompt_too(problem):
    similarity, labels, affinities = problem
    seeds = make_seeds(similarity, labels, affinities, settings(normalization="row"))
    assert torch.allclose(seeds.cam_BNC.sum(-1) + seeds.background_BN, torch.ones(2, 12), atol=1e-6)


def test_recipes_default_transport_is_no_worse_than_the_affinity_and_near_its_best_threshold(sample_data):
    """On similarities made from real masks, where our first reading of the print loses a quarter of the mIoU at every contrast."""
    pictures, threshold = read_pictures(sample_data, every=5), load("voc_dfa", []).cam.threshold
    known = affinities_of(pictures, seed=0)
    for contrast, prompts in ((0.06, 3), (0.04, 12), (0.02, 3)):
        cosine = similarity_of(pictures, contrast=contrast, prompts=prompts, leak=0.4, noise=0.01, seed=0)
        transport, affinity, printed = (
            miou_by_threshold(pictures, make_seeds(cosine, pictures.labels_BC, known, STAGES[name]).cam_BNC)
            for name in ("transport", "affinity", "first reading of the print")
        )
        assert transport[threshold] > affinity[threshold] - 0.5  # 65 images: half a point is noise
        assert transport[threshold] > max(transport.values()) - 3
        assert printed[threshold] < 0.75 * transport[threshold]


@pytest.mark.parametrize("columns", ["strongest", "prompts", "constant"])
@pytest.mark.parametrize("generator", ["similarity", "affinity", "elementwise", "transport"])
def test_columns_of_absent_classes_are_not_computed_with(problem, generator, columns):
    similarity, labels, affinities = problem
    chosen = settings(generator=generator, columns=columns, propagation=2)
    expected = make_seeds(similarity, labels, affinities, chosen)
    absent = torch.nn.functional.pad(~labels, (0, 3), value=False)[:, None, :]
    seeds = make_seeds(similarity.masked_fill(absent, torch.nan), labels, affinities, chosen)
    assert torch.equal(seeds.cam_BNC, expected.cam_BNC)
    assert torch.equal(seeds.background_BN, expected.background_BN)


@pytest.mark.parametrize("second", [(), (0,)])
def test_an_image_s_seeds_do_not_depend_on_its_neighbours_nor_on_how_affinities_come(problem, second):
    similarity, labels, affinities = problem
    labels = labels.clone()
    labels[1] = False
    labels[1, list(second)] = True  # fewer classes than its neighbour
    each = [
        Affinities(*(part[b : b + 1] for part in (affinities.low_BNN, affinities.high_BNN, affinities.reliability_BN)))
        for b in range(2)
    ]
    for generator in ("affinity", "elementwise", "transport"):
        chosen = settings(generator=generator, propagation=3)
        whole, grouped = (make_seeds(similarity, labels, given, chosen) for given in (affinities, iter(each)))
        for b in range(2):
            alone = make_seeds(similarity[b : b + 1], labels[b : b + 1], each[b], chosen)
            for seeds in (whole, grouped):
                # fp32; the min-max of columns propagated three times stretches their rounding
                torch.testing.assert_close(seeds.cam_BNC[b], alone.cam_BNC[0], atol=1e-4, rtol=0)
                torch.testing.assert_close(seeds.background_BN[b], alone.background_BN[0], atol=1e-4, rtol=0)
        assert whole.cam_BNC[1].amax(0).tolist() == labels[1].float().tolist()
        assert whole.background_BN[1].max() == 1
    with pytest.raises(ValueError, match="affinities of 1 images for the similarity of 2"):
        make_seeds(similarity, labels, each[:1], settings())


def test_a_row_term_without_reliability_is_refused(problem):
    similarity, labels, affinities = problem
    bare = Affinities(affinities.low_BNN, affinities.high_BNN, None)
    make_seeds(similarity, labels, bare, settings())
    with pytest.raises(ValueError, match="needs the affinities' reliability_BN"):
        make_seeds(similarity, labels, bare, settings(form="row_term"))


def test_an_image_of_one_class_does_not_get_a_cam_of_one_everywhere(problem):
    similarity, labels, affinities = problem
    cam = make_seeds(similarity, labels, affinities, settings()).cam_BNC[1, :, 1]
    assert cam.min() < 0.7


def test_affinity_seeds_equal_a_slow_loop(problem):
    similarity, labels, affinities = problem
    cam = make_seeds(similarity, labels, affinities, settings(generator="affinity", propagation=2)).cam_BNC
    low, score = affinities.low_BNN[0].double().numpy(), _scores(similarity[0].numpy(), [0, 2, 4, 5, 6], 5.0)
    expected = _min_max(low @ (low @ score))[:, :2]
    assert np.allclose(cam[0][:, [0, 2]].numpy(), expected, atol=1e-5)  # fp32


def test_similarity_seeds_need_no_affinity_and_others_say_so(problem):
    similarity, labels, _ = problem
    make_seeds(similarity, labels, None, settings(generator="similarity"))
    with pytest.raises(ValueError, match="needs affinities"):
        make_seeds(similarity, labels, None, settings())


def test_a_bank_without_background_prompts_is_refused(problem):
    similarity, labels, affinities = problem
    with pytest.raises(ValueError, match="leave none for the background"):
        make_seeds(similarity[:, :, :4], labels, affinities, settings())


def test_a_constant_column_takes_all_the_background_s_mass(problem):
    similarity, labels, affinities = problem
    near_zero, near_one = (
        make_seeds(similarity, labels, affinities, settings(columns="constant", constant=level, marginal="uniform"))
        for level in (0.01, 0.99)
    )
    # A column that is constant over patches pays the same everywhere: its level changes no plan of fixed marginals.
    assert torch.allclose(near_zero.cam_BNC, near_one.cam_BNC, atol=1e-3)
    assert near_zero.background_BN.shape == (2, 12)


def test_the_column_mask_has_the_image_s_classes_and_every_prompt():
    mask = column_mask(torch.tensor([[True, False]]), 5)
    assert mask.tolist() == [[True, False, True, True, True]]
