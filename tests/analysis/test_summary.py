import json
import math

import pytest

from dfa.analysis.summary import TruncationCosts, summarise
from dfa.analysis.sums import no_pairs, pair_sums
from dfa.report.page import render
from dfa.report.spectral import spectral_report
from tests.analysis.made import NAMES, SETTINGS, logits_of, prediction_of, truth_of

COSTS = TruncationCosts("model", 100.0, {20: 400.0, 9: 81.0, 5: 25.0, 15: 225.0}, full_grid=20)
OPTIONS = {
    "class_names": ("background", *NAMES),
    "grids": (33, 11, 7, 3),
    "max_drop": 0.05,
    "epsilon": None,
    "costs": (COSTS,),
}


def sums_of(of, count=4):
    return sum((pair_sums(of(n), truth_of(n), SETTINGS) for n in range(count)), no_pairs(SETTINGS))


@pytest.fixture
def found():
    return summarise(sums_of(logits_of), **OPTIONS)


def test_the_rings_of_the_cross_entropy_add_up_to_what_the_band_has(found):
    curve = found["curve"]
    assert found["predictions"] == "logits" and found["epsilon"] is None
    running = 0.0
    for share, rate, truncated in zip(
        curve["cross_entropy_share"], curve["loss_rate"], curve["truncated_cross_entropy"], strict=True
    ):
        running += share
        assert math.isclose(abs(1 - running), rate, abs_tol=1e-12)
        assert math.isclose(running * found["cross_entropy"], truncated, abs_tol=1e-12)
    assert curve["nu_max"] == [0, 1, 2, 3, 4, 5] and curve["grid"] == [1, 3, 5, 7, 9, 11]


def test_the_table_has_the_grids_that_the_bands_resolve(found):
    assert [(row["grid"], row["nu_max"]) for row in found["grids"]] == [(11, 5), (7, 3), (3, 1)]
    for row in found["grids"]:
        rate = found["curve"]["loss_rate"][row["nu_max"]]
        assert row["loss_rate"] == rate
        if rate < 0.2:
            assert math.isclose(row["estimated_drop"], 0.6725 * rate + 0.0022)
            assert math.isclose(row["estimated_miou"], found["miou"] * (1 - row["estimated_drop"]))
        else:
            assert row["estimated_drop"] is None and row["estimated_miou"] is None


def test_the_full_grid_has_the_measured_miou_and_unresolved_ones_none(found):
    table = found["feature_truncation"][0]
    rows = {row["grid"]: row for row in table["rows"]}
    assert list(rows) == [20, 15, 9, 5]
    assert rows[20]["estimated_miou"] == found["miou"] and rows[20]["flops"] == 500
    assert math.isclose(rows[20]["fpi"], 500 / (100 * found["miou"]))
    assert rows[15]["fpi"] is None  # nu_max 7 was not measured
    assert rows[9]["flops"] == 181
    rate = found["curve"]["loss_rate"][4]
    assert rate < 0.2 and math.isclose(rows[9]["estimated_miou"], found["miou"] * (1 - 0.6725 * rate - 0.0022))
    known = {grid: row["fpi"] for grid, row in rows.items() if row["fpi"] is not None}
    assert table["best_grid"] == min(known, key=known.__getitem__)


def test_a_lenient_rule_recommends_a_smaller_grid_and_a_strict_one_none():
    sums = sums_of(logits_of)
    chosen = {drop: summarise(sums, **OPTIONS | {"max_drop": drop})["recommended_grid"] for drop in (0.0, 0.05, 0.13)}
    rates = dict(zip([1, 3, 5, 7, 9, 11], sums.logits.loss_rate().tolist(), strict=True))
    for drop, grid in chosen.items():
        passing = [g for g, rate in rates.items() if g > 1 and rate < 0.2 and 0.6725 * rate + 0.0022 <= drop]
        expected = None
        for g in (11, 9, 7, 5, 3):
            if g not in passing:
                break
            expected = g
        assert grid == expected
    assert chosen[0.0] is None and chosen[0.13] is not None


def test_label_maps_have_an_error_rate_instead_of_logits():
    sums = sums_of(prediction_of)
    found = summarise(sums, **OPTIONS)
    assert found["predictions"] == "label maps" and found["epsilon"] == sums.labels.epsilon()
    other = summarise(sums, **OPTIONS | {"epsilon": 0.3})
    assert other["epsilon"] == 0.3 and other["cross_entropy"] != found["cross_entropy"]
    assert other["miou"] == found["miou"] == sums.labels.mean_iou()
    assert found["boundary_miou"] == sums.boundary.mean_iou()


def test_a_class_that_never_occurs_has_no_iou():
    sums = pair_sums(prediction_of(0) % 2, truth_of(0) % 2, SETTINGS)
    rows = summarise(sums, **OPTIONS)["per_class"]
    assert [row["class"] for row in rows] == ["background", "cat", "dog"]
    assert rows[2]["iou"] is None and rows[0]["iou"] is not None


def test_the_numbers_are_json_and_the_page_shows_them(found):
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    page = render(spectral_report(found, title="a <model>", provenance={"predictions": "p"}))
    assert "a &lt;model&gt;" in page and page.count("<img") == 4
    assert "Feature truncation: model, least FPI on" in page and "boundary mIoU" in page
    assert f"{100 * found['miou']:.1f}" in page and f"over {found['num_pairs']} pairs" in page
    assert "rejects.jsonl" not in page
    less = render(spectral_report(found | {"num_rejects": 7}, title="a", provenance={}))
    assert "7 could not be used, see rejects.jsonl" in less


def test_the_operations_of_a_small_decoder_keep_their_digits(found):
    rows = found["feature_truncation"][0]["rows"]
    page = render(spectral_report(found, title="a", provenance={}))
    for row in rows:
        assert f"<td>{row['decoder_flops'] / 1e9:.4g}</td>" in page
        assert row["fpi"] is None or f"<td>{row['fpi'] / 1e9:.4g}</td>" in page
    assert any(row["fpi"] is not None for row in rows)


def test_a_page_without_boundaries_or_a_recommendation_leaves_them_out():
    sums = sums_of(prediction_of)
    plain = summarise(type(sums)(sums.labels, None, sums.logits), **OPTIONS | {"max_drop": 0.0})
    assert plain["recommended_grid"] is None and plain["boundary_miou"] is None
    page = render(spectral_report(plain, title="x", provenance={}))
    assert "boundary" not in page and "recommended grid" not in page
