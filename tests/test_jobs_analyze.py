"""analyze through Ray on a few pairs: the numbers of the library, killed and continued; blocks, and what may be asked for."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from dfa import build
from dfa.analysis import stream, sums
from dfa.analysis.maps import find_maps, join_pairs
from dfa.config import load
from jobs import analyze, blocks
from tests.analysis.made import SETTINGS, logits_of, prediction_of, truth_of, write_arrays, write_images, write_pngs

COUNT = 9


def configured(tmp_path, *overrides):
    classes = tmp_path / "classes.yaml"
    classes.write_text("names: [cat, dog]\nbackground: [road]\ntemplates: ['a {}.']\n")
    small = ["analyze.nu_max=5", "analyze.pairs_per_part=2", "analyze.cpus=0.5", "analyze.boundary=true"]
    return load("demo", [f"run={tmp_path}/run", f"data.classes={classes}", *small, *overrides])


def test_the_job_gives_the_numbers_of_one_process(tmp_path, ray_session):
    keys = [f"k{number}" for number in range(COUNT)]
    images = write_images(tmp_path / "images", {key: truth_of(n) for n, key in enumerate(keys)})
    arrays = write_arrays(tmp_path / "p", {key: logits_of(n) for n, key in enumerate(keys)})
    config = configured(tmp_path, f"analyze.prediction={arrays}", f"shards.val={images.root}")
    result = analyze.work(config)
    assert (result["num_pairs"], result["analyzed_now"], result["num_rejects"]) == (COUNT, COUNT, 0)
    assert result["output"] == f"{tmp_path}/run/analysis/p"
    expected = sum((sums.pair_sums(logits_of(n), truth_of(n), SETTINGS) for n in range(COUNT)), sums.no_pairs(SETTINGS))
    found = json.loads((tmp_path / "run/analysis/p/analysis.json").read_text())
    # Sums in another order.
    assert math.isclose(found["miou"], expected.labels.mean_iou(), rel_tol=1e-12)
    assert found["curve"]["loss_rate"] == pytest.approx(expected.logits.loss_rate().tolist(), abs=1e-9)
    assert found["boundary_miou"] == pytest.approx(expected.boundary.mean_iou())
    assert "DeepLabv3+" in (tmp_path / "run/analysis/p/analysis.html").read_text()
    again = analyze.work(config)
    assert again["analyzed_now"] == 0 and again["loss_rate"] == result["loss_rate"]


def test_a_killed_analysis_sums_what_is_missing_to_the_same_bytes(tmp_path, ray_session):
    truth = write_pngs(tmp_path / "t", {f"k{n}": truth_of(n) for n in range(COUNT)})
    prediction = write_pngs(tmp_path / "p", {f"k{n}": prediction_of(n) for n in range(COUNT)})
    sides = [find_maps(root, field="x", num_classes=3) for root in (prediction, truth)]
    parts = join_pairs(*sides, pairs_per_part=2)
    settings = replace(SETTINGS, boundary=False)
    for name in ("whole", "killed"):
        sums.begin(str(tmp_path / name), {})
        assert stream.run(str(tmp_path / name), parts, settings, cpus=0.5).pairs_now == COUNT
    (tmp_path / "killed/parts/part-000001.json").unlink()
    (tmp_path / "killed/parts/part-000003.json").write_text("{")
    kept = (tmp_path / "killed/parts/part-000000.json").stat().st_mtime_ns
    done = stream.run(str(tmp_path / "killed"), parts, settings, cpus=0.5)
    assert done.pairs_now == 4
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "parts").iterdir()} for name in ("whole", "killed")
    ]
    assert files[0] == files[1]
    assert (tmp_path / "killed/parts/part-000000.json").stat().st_mtime_ns == kept


def test_a_damaged_shard_fails_its_parts_alone(tmp_path, ray_session):
    images = write_images(tmp_path / "images", {f"k{n}": truth_of(n) for n in range(COUNT)})
    prediction = write_pngs(tmp_path / "p", {f"k{n}": prediction_of(n) for n in range(COUNT)})
    path = tmp_path / "images/shard-000001.tar"
    config = configured(tmp_path, f"analyze.prediction={prediction}", f"analyze.truth={images.root}")
    content = path.read_bytes()
    path.write_bytes(b"x" * 1024)
    with pytest.raises(ValueError, match=r"2 of 6 parts cannot be analysed, the others are done: .*shard-000001.tar"):
        analyze.work(config)
    path.write_bytes(content)
    result = analyze.work(config)
    assert result["analyzed_now"] == 3 and result["num_pairs"] == COUNT


def test_too_many_unusable_pairs_fail_the_job_after_the_sums(tmp_path, ray_session):
    truth = write_pngs(tmp_path / "t", {f"k{n}": truth_of(n) for n in range(COUNT)})
    prediction = write_pngs(tmp_path / "p", {f"k{n}": prediction_of(n) for n in range(COUNT - 1)})
    overrides = (f"analyze.prediction={prediction}", f"analyze.truth={truth}")
    with pytest.raises(ValueError, match=r"1 pairs cannot be analysed \(11.11%\), .* k8: prediction: no such file"):
        analyze.work(configured(tmp_path, *overrides))
    result = analyze.work(configured(tmp_path, *overrides, "data.max_reject_share=0.2"))
    assert result["analyzed_now"] == 0 and result["rejects"] == ["k8: prediction: no such file"]
    (line,) = Path(result["output"], "rejects.jsonl").read_text().splitlines()
    assert json.loads(line) == {"key": "k8", "reason": "prediction: no such file"}
    assert "1 could not be used" in Path(result["page"]).read_text()


def test_an_analysis_of_other_folders_in_the_same_place_is_told(tmp_path, caplog):
    sums.begin(str(tmp_path / "a"), {"prediction": "one", "truth": "t"})
    sums.begin(str(tmp_path / "a"), {"prediction": "one", "truth": "t"})
    assert "held the analysis" not in caplog.text
    sums.begin(str(tmp_path / "a"), {"prediction": "two", "truth": "t"})
    assert "held the analysis of another prediction one; it is replaced" in caplog.text


@pytest.mark.parametrize("grid", [0, -3, 8])
def test_a_grid_that_no_band_needs_is_refused(tmp_path, grid):
    with pytest.raises(ValueError, match=rf"analyze\.grids has {grid}, allowed are odd numbers"):
        build.analysis_settings(configured(tmp_path, f"analyze.grids=[{grid}]"))


def test_block_wise_masks_are_written_from_shards_and_from_folders(tmp_path):
    truths = {f"k{n}": truth_of(n) for n in range(4)}
    images = write_images(tmp_path / "images", truths)
    result = blocks.work(configured(tmp_path, f"shards.train={images.root}", "blocks.grid=4"))
    assert result == {
        "job": "blocks",
        "output": f"{tmp_path}/run/blocks/4",
        "grid": 4,
        "num_masks": 4,
        "num_rejects": 0,
        "rejects": [],
    }
    masks = write_pngs(tmp_path / "masks", truths)
    config = configured(tmp_path, f"blocks.input={masks}", f"blocks.output={tmp_path}/out")
    assert blocks.work(config)["num_masks"] == 4 and len(list((tmp_path / "out").iterdir())) == 4
    config.blocks.output = f"{masks}/out"
    with pytest.raises(ValueError, match=r"lies inside blocks.input"):
        blocks.work(config)
    with pytest.raises(ValueError, match=r"blocks.input and shards.train are empty"):
        blocks.work(configured(tmp_path))
    with pytest.raises(ValueError, match=r"blocks.input=.*nowhere is no folder; give one of image shards"):
        blocks.work(configured(tmp_path, f"blocks.input={tmp_path}/nowhere"))
    with pytest.raises(ValueError, match=r"^shards.train: .*give a folder of image shards with masks, or of PNG masks"):
        blocks.work(configured(tmp_path, f"shards.train={tmp_path}/run/blocks/4"))


def test_truncated_decoders_of_the_configuration_cost_less(tmp_path):
    own, theirs = build.truncation_costs(load("voc_dfa"), [129, 65, 17, 9])
    assert own.full_grid == 20 and sorted(own.decoder) == [9, 17, 20]
    assert own.decoder[9] < own.decoder[17] < own.decoder[20]
    assert sorted(theirs.decoder) == [9, 17, 65, 129] and theirs.encoder == 95.6e9
