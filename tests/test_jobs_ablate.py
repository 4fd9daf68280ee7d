"""jobs/ablate: what a file of variants may say, the table, and two variants trained and scored once."""

import json
from pathlib import Path

import pytest

from dfa.config import CONF, load, read_yaml
from dfa.world.folder import write_voc
from jobs import ablate
from jobs.ablate import Ablation
from tests.small_runs import write_shards


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"variants": {}}, "variants must map names to differences"),
        ({"variants": {"a": {}}, "seed": 1}, "unknown key 'seed', allowed are seeds, common and variants"),
        ({"variants": {"a": {}}, "common": [1]}, "common must be a mapping"),
        ({"variants": {"a": {}}, "seeds": 3}, "seeds must be a list of whole numbers, got 3"),
        ({"variants": {"a": {}}, "seeds": [True]}, "seeds must be a list"),
        ({"variants": {"../a": {}}}, "variant '../a' is the name of a folder too"),
        ({"variants": {"a": "method=ffr"}}, "variant a must be a mapping"),
    ],
)
def test_a_file_of_variants_that_says_something_else_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        Ablation.from_mapping(content)


def test_a_wrong_key_is_told_with_its_variant_before_anything_is_trained(tmp_path):
    ablation = Ablation.from_mapping({"variants": {"good": {}, "bad": {"decoder.mixr": "spam"}}})
    with pytest.raises(ValueError, match=r"^variant bad: .*decoder\.mixr.*decoder\.mixer"):
        ablate.work("demo", ablation, [f"run={tmp_path}/run"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["ladder", "levers", "readings", "world"])
def test_the_ablations_of_the_world_are_valid(name):
    path, content = read_yaml(f"ablations/{name}")
    ablation = Ablation.from_mapping(content)
    assert path == str(CONF / "ablations" / f"{name}.yaml") and ablation.variants
    for changes in ablation.variants.values():
        load("demo", [*ablation.common, *changes])


def test_the_table_names_what_all_variants_share():
    ablation = Ablation.from_mapping({"common": {"cam.propagation": 2}, "variants": {"a": {}}})
    assert ablate.table(ablation, []).splitlines()[-1] == "All: `cam.propagation=2`"


def test_the_table_has_means_and_ranges_over_the_seeds():
    ablation = Ablation((0, 1, 2), {"a": (), "b": ("method=ffr",), "later": ()})
    scores = {("a", 0): (50.0, 40.0), ("a", 1): (53.0, None), ("b", 0): (1.25, 2.0)}
    rows = [
        {"variant": name, "seed": seed, "seed_miou": one, "val_miou": other}
        for (name, seed), (one, other) in scores.items()
    ]
    assert ablate.table(ablation, rows).splitlines() == [
        "| variant | seed_miou | val_miou | differences |",
        "|---|---|---|---|",
        "| a | 51.5 (50.0 to 53.0) | 40.0 |  |",
        "| b | 1.2 | 2.0 | `method=ffr` |",
    ]


@pytest.mark.runs
@pytest.mark.usefixtures("ray_session")
def test_variants_are_trained_and_scored_once(tmp_path, caplog):
    paths = [f"run={tmp_path}/run", f"shards.train={tmp_path}/train", f"shards.val={tmp_path}/val"]
    small = ["train.steps=1", "train.batch_size=2", "train.workers=1", "decoder.width=32", "decoder.depth=1"]
    small += ["evaluate.scales=[1.0]", "evaluate.parts=[val]", "clip.checkpoint=random"]
    config = load("demo", [*paths, *small])
    config.data.root = str(write_voc(tmp_path / "world", seed=1, num_train=4, num_val=2))
    for split in ("train", "val"):
        write_shards(config, getattr(config.shards, split), split)
    # The command line (train.steps=1) overrules what is common, a variant overrules both.
    common = {"train.steps": 7, "decoder.mixer": "hybrid", "frequency.mu": 0.3}
    variants = {"dfa": {"decoder.mixer": "attention"}, "spam": {"decoder.mixer": "spam"}}
    ablation = Ablation.from_mapping({"seeds": [5], "common": common, "variants": variants})
    result = ablate.work("demo", ablation, [*paths, *small])
    assert [row["variant"] for row in result["rows"]] == ["dfa", "spam"]
    folder = Path(config.run) / "ablation"
    assert json.loads((folder / "ablation.json").read_text())["rows"] == result["rows"]
    described = json.loads((folder / "spam-5" / "run.json").read_text())["config"]
    assert (described["decoder"]["mixer"], described["train"]["seed"]) == ("spam", 5)
    assert (described["train"]["steps"], described["frequency"]["mu"]) == (1, 0.3)
    checkpoint = folder / "spam-5" / "checkpoints" / "step-00000001"
    written = checkpoint.stat().st_mtime_ns
    assert ablate.work("demo", ablation, [*paths, *small]) == result
    assert checkpoint.stat().st_mtime_ns == written
