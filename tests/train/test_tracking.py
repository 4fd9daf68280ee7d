"""Metrics in a real MLflow, kept in a folder."""

import logging
import sys

import pytest

from dfa.data import storage
from dfa.train.tracking import MlflowTracker, check_installed

PARAMETERS = {"train": {"steps": 5, "seed": 0}, "name": "owls"}


@pytest.fixture
def mlflow(monkeypatch):
    module = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    monkeypatch.setenv(
        "MLFLOW_ALLOW_FILE_STORE", "true"
    )  # a server or a data base is what people use; this needs neither
    return module


def curve(mlflow, tracking, run, name):
    client, run_id = mlflow.MlflowClient(tracking_uri=tracking), storage.read_json(f"{run}/mlflow.json")["run_id"]
    return client.get_run(run_id), [(each.step, each.value) for each in client.get_metric_history(run_id, name)]


def test_a_resumed_run_continues_the_same_mlflow_run(mlflow, tmp_path):
    tracking, run = f"file://{tmp_path}/mlflow", str(tmp_path / "run")
    storage.make_folder(run)
    first = MlflowTracker(tracking, run, name="owls", parameters=PARAMETERS)
    first.write("train", 2, {"loss": 0.5, "text": "x", "bad": float("nan")})
    first.write("val", 2, {"miou": 0.25, "iou_tv/monitor (old)": 0.5})
    first._pool.shutdown()  # a crash: the MLflow run stays open
    found, _ = curve(mlflow, tracking, run, "train/loss")
    assert found.info.status == "RUNNING" and set(found.data.metrics) == {
        "train/loss",
        "val/miou",
        "val/iou_tv/monitor _old_",
    }
    second = MlflowTracker(tracking, run, name="owls", parameters={"train": {"steps": 9, "seed": 0}, "name": "owls"})
    second.write("train", 4, {"loss": 0.25})
    second.close()
    found, losses = curve(mlflow, tracking, run, "train/loss")
    assert losses == [(2, 0.5), (4, 0.25)]
    assert (found.info.status, found.info.run_name) == ("FINISHED", "owls")
    assert found.data.params == {"train.steps": "5", "train.seed": "0", "name": "owls"}
    assert found.data.tags["changed.train.steps"] == "9"
    (experiment,) = mlflow.MlflowClient(tracking_uri=tracking).search_experiments(filter_string="name = 'dfa'")
    assert len(mlflow.MlflowClient(tracking_uri=tracking).search_runs([experiment.experiment_id])) == 1


def test_a_tracking_address_that_cannot_be_used_is_named(mlflow, tmp_path):
    with pytest.raises(ValueError, match=r"train\.mlflow 'nope://x' cannot be used"):
        MlflowTracker("nope://x", str(tmp_path), name="x", parameters={})


def test_a_tracker_that_fails_later_costs_a_warning_and_no_training(mlflow, tmp_path, caplog):
    tracker = MlflowTracker(f"file://{tmp_path}/mlflow", str(tmp_path), name="x", parameters={})
    (record,) = (tmp_path / "mlflow").glob("*/*/meta.yaml")
    record.unlink()
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            tracker.write("train", step, {"loss": 1.0})
        tracker.close()
    assert caplog.text.count("training goes on") == 1
    assert "did not take 2 lines" in caplog.text


def test_an_absent_package_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "mlflow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(
        ValueError, match=r"train\.mlflow is set and MLflow is not installed .*pip install mlflow-skinny"
    ):
        check_installed()
