"""Labelling, prediction, evaluation and report of a run in an object store, against the same run in a folder."""

import copy
from pathlib import Path

import pytest

import dfa
from dfa.config import load
from dfa.data import storage
from dfa.label.work import LocalPool
from dfa.train.record import Recorder
from dfa.world.folder import write_voc
from jobs import evaluate, predict, pseudo_label, report
from tests.data.object_store import address, object_store
from tests.small_runs import untrained_checkpoint, write_shards


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The same untrained run twice, in a folder and in a store; shards and pictures are in a folder."""
    root = tmp_path_factory.mktemp("remote")
    small = [
        "decoder.width=32",
        "decoder.depth=1",
        "evaluate.scales=[1.0]",
        "label.batch_size=4",
        "label.scorers=1",
        "label.png=true",
    ]
    paths = [f"run={root}/run", f"shards.train={root}/train", f"shards.val={root}/val"]
    local = load("demo", ["clip.checkpoint=random", *paths, *small, "label.coco=true", "evaluate.flip=false"])
    local.data.root = str(write_voc(root / "world", seed=1, num_train=4, num_val=3))
    for split in ("train", "val"):
        write_shards(local, getattr(local.shards, split), split, samples_per_shard=2)
    local.predict.input = str(root / "photos")
    Path(local.predict.input).mkdir()
    for path in sorted((root / "world").rglob("*.jpg"))[:3]:
        (root / "photos" / path.name).write_bytes(path.read_bytes())
    with object_store() as port:
        remote = copy.deepcopy(local)
        remote.run = address(port, "runs/owls")
        for config in (local, remote):
            untrained_checkpoint(config)
            recorder = Recorder(config.run, rank=0, first_step=0)
            recorder.write("train", 1, {"loss": 1.0})
            recorder.close()
        yield local, remote


def contents(folder):
    names = [name for name in storage.list_names(folder) if name.endswith((".tar", ".png"))]
    return {name: storage.read_bytes(storage.join(folder, name)) for name in names}


@pytest.mark.runs
def test_labels_predictions_and_scores_of_a_remote_run_on_ray_are_those_of_a_local_one_in_one_process(
    configs, ray_session
):
    labelled, predicted, scored = (
        [job.work(config, pool) for config, pool in zip(configs, (LocalPool(), None), strict=True)]
        for job in (pseudo_label, predict, evaluate)
    )
    for key, results in {"labels": labelled, "png_folder": labelled, "output": predicted}.items():
        local, remote = (contents(result[key]) for result in results)
        assert local and remote == local
    assert predicted[1]["output"] == storage.join(configs[1].run, "predict/photos")
    assert storage.exists(storage.join(configs[1].run, "labels/train_quality/quality.html"))
    for key in ("seed_miou", "mask_miou", "val_miou", "per_class"):
        assert scored[1][key] == scored[0][key]
    assert storage.read_json(storage.join(configs[1].run, "evaluate.json"))["val_miou"] == scored[1]["val_miou"]
    page = report.work(configs[1])["report"]
    assert page == storage.join(configs[1].run, "report.html")
    assert b"The parts of the loss" in storage.read_bytes(page)
    assert storage.read_bytes(storage.join(configs[1].run, "examples.png")).startswith(b"\x89PNG")


def test_a_model_is_loaded_from_an_address(configs):
    local, remote = (dfa.load(config.run, scales=(1.0,), flip=False) for config in configs)
    picture = next(Path(configs[0].predict.input).iterdir())
    assert (local.predict(picture).scores == remote.predict(picture).scores).all()
    with pytest.raises(ValueError, match=r"runs/nothing\?.* is no folder with state\.json or checkpoints/ in it"):
        dfa.load(configs[1].run.replace("runs/owls", "runs/nothing"))
