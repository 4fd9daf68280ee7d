import json
import math

import numpy as np
import pytest
import torch

from dfa.analysis.maps import find_maps, join_pairs
from dfa.analysis.sums import begin, commit, committed, from_plain, no_pairs, pair_sums, sum_pairs, to_plain, total
from tests.analysis.made import SETTINGS, logits_of, prediction_of, slow_band, truth_of, write_arrays, write_pngs


def parts_of(root, predictions, truths, *, write=write_pngs, pairs_per_part=2):
    sides = (write(root / "p", predictions), write_pngs(root / "t", truths))
    found = (find_maps(side, field="x", num_classes=3) for side in sides)
    return join_pairs(*found, pairs_per_part=pairs_per_part)


def numbered(of, count=5):
    return {f"k{number}": of(number) for number in range(count)}


def test_the_sums_of_label_maps_equal_slow_loops(tmp_path):
    parts = parts_of(tmp_path, numbered(prediction_of), numbered(truth_of))
    found = sum((sum_pairs(part, SETTINGS) for part in parts), no_pairs(SETTINGS))
    assert found.labels.num_images == 5 and not found.rejects and found.logits.num_images == 0
    for label in range(3):
        pairs = [(prediction_of(n) == label, truth_of(n) == label, truth_of(n) != 255) for n in range(5)]
        expected = sum(slow_band(truth, prediction, 5) for prediction, truth, _ in pairs)
        np.testing.assert_allclose(found.labels.band_CK[label], expected, atol=1e-2, rtol=1e-5)  # float32 transforms
        assert found.labels.truth_C[label] == sum(truth.sum() for _, truth, _ in pairs)
        assert found.labels.prediction_C[label] == sum((prediction & valid).sum() for prediction, _, valid in pairs)
        assert found.labels.common_C[label] == sum((prediction & truth).sum() for prediction, truth, _ in pairs)


def test_the_sums_of_logits_equal_slow_loops(tmp_path):
    parts = parts_of(tmp_path, numbered(logits_of), numbered(truth_of), write=write_arrays)
    found = sum((sum_pairs(part, SETTINGS) for part in parts), no_pairs(SETTINGS))
    expected, summed = np.zeros(6), 0.0
    for number in range(5):
        logits, truth = logits_of(number).astype(np.float64), truth_of(number)
        surprise = np.log(np.exp(logits).sum(0)) - logits
        for label in range(3):
            expected += slow_band(truth == label, surprise[label], 5)
            summed += surprise[label][truth == label].sum()
    np.testing.assert_allclose(found.logits.band_K, expected, rtol=1e-4)  # float32 transforms
    assert math.isclose(found.logits.total, summed, rel_tol=1e-5)
    assert found.cross_entropy() is found.logits
    assert found.labels.common_C.sum() == sum((logits_of(n).argmax(0) == truth_of(n)).sum() for n in range(5))


def test_logits_of_another_size_are_brought_to_the_truth():
    truth, coarse = truth_of(0), logits_of(1)
    full = torch.nn.functional.interpolate(torch.from_numpy(coarse)[None], truth.shape, mode="bilinear")[0].numpy()
    small, large = (pair_sums(each, truth, SETTINGS) for each in (coarse, full))
    torch.testing.assert_close(small.logits.band_K, large.logits.band_K)
    assert small.labels.num_images == 1 and torch.equal(small.labels.common_C, large.labels.common_C)


def test_unusable_pairs_are_left_out_with_their_reason(tmp_path):
    predictions, truths = numbered(prediction_of), numbered(truth_of)
    predictions["k1"] = predictions["k1"][:-1]
    truths["k2"] = truths["k2"] | 4
    del predictions["k3"]
    parts = parts_of(tmp_path, predictions, truths)
    (tmp_path / "p/k4.png").write_bytes(b"no PNG")
    found = sum((sum_pairs(part, SETTINGS) for part in parts), no_pairs(SETTINGS))
    assert found.labels.num_images == 1
    reasons = {each.key: each.reason for each in found.rejects}
    assert reasons.keys() == {"k1", "k2", "k3", "k4"}
    assert reasons["k1"].startswith("pair: prediction (16, 21) and truth (17, 21)")
    assert "classes must be in [0, 2] or 255" in reasons["k2"]
    assert reasons["k3"] == "prediction: no such file" and reasons["k4"].startswith("prediction: ")


def test_logits_that_are_not_finite_are_refused():
    logits = logits_of(0)
    logits[1, 2, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        pair_sums(logits, truth_of(0), SETTINGS)


def test_logits_and_label_maps_do_not_mix():
    sums = pair_sums(logits_of(0), truth_of(0), SETTINGS) + pair_sums(prediction_of(0), truth_of(0), SETTINGS)
    with pytest.raises(ValueError, match="1 of 2 predictions are logits"):
        sums.cross_entropy()


def test_sums_survive_writing_to_the_last_bit(tmp_path):
    sums = pair_sums(logits_of(0), truth_of(0), SETTINGS)
    begin(str(tmp_path / "out"), {})
    commit(str(tmp_path / "out"), "part-000000", "hash", sums)
    found = committed(str(tmp_path / "out"), "part-000000", "hash")
    assert to_plain(found) == to_plain(sums) and found.boundary is not None
    for name in ("band_CK", "truth_C", "common_C"):
        assert torch.equal(getattr(found.labels, name), getattr(sums.labels, name))
    assert from_plain(json.loads(json.dumps(to_plain(no_pairs(SETTINGS))))).labels.num_images == 0


def test_a_part_of_other_files_or_a_torn_one_is_not_taken(tmp_path):
    out, sums = str(tmp_path), pair_sums(prediction_of(0), truth_of(0), SETTINGS)
    begin(out, {})
    commit(out, "part-000000", "hash", sums)
    assert committed(out, "part-000000", "other") is None and committed(out, "part-000001", "hash") is None
    with pytest.raises(ValueError, match="the sums of part-000001 are missing"):
        total(out, [("part-000000", "hash"), ("part-000001", "hash")], SETTINGS)
    commit(out, "part-000001", "hash", sums)
    assert total(out, [("part-000000", "hash")], SETTINGS).labels.num_images == 1
    assert not (tmp_path / "parts/part-000001.json").exists()
    path = tmp_path / "parts/part-000000.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert committed(out, "part-000000", "hash") is None


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(ValueError, match=r"is not empty and holds no analysis \(photo.jpg\)"):
        begin(str(tmp_path), {})
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/plan.json").write_text('{"kind": "dfa-label-plan"}')
    with pytest.raises(ValueError, match="is no plan of an analysis"):
        begin(str(tmp_path / "labels"), {})
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        begin(str(tmp_path / "file/out"), {})
