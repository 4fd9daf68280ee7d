"""A run's metrics in MLflow, where the configuration asks for it (train.mlflow). The package is needed then only."""

import importlib
import logging
import math
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dfa.data import storage

logger = logging.getLogger(__name__)

MLFLOW_NAME = "mlflow.json"
EXPERIMENT = "dfa"
_MAX_PARAMETER = 6000  # characters of a value that MLflow takes
_BATCH = 100  # parameters that it takes at once
_FORBIDDEN = re.compile(r"[^\w\-. /]")
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # 7 by default: minutes for each line when a server is gone
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class MlflowTracker:
    """Sends metrics as `kind/name` to one MLflow run, in a thread of its own.

    RUN/mlflow.json keeps the MLflow run's id, so that a resumed training continues the same one. Steps that are trained
    again after a crash appear there twice: MLflow forgets nothing.

    A server that cannot be reached at the start is an error; later it costs its metrics and a warning, not the training.

    Args:
        tracking: MLflow's tracking address: http(s)://, sqlite:///, or a folder.
        run: the run folder.
        name: how a new MLflow run is called.
        parameters: nested mapping, written as `section.key` at each start; what a resumed start changes is kept as the tag
            `changed.section.key`, since MLflow's parameters are final.

    Raises:
        ValueError: the package is absent, or MLflow refuses the address; both are named.
    """

    def __init__(self, tracking: str, run: str, *, name: str, parameters: Mapping[str, Any]) -> None:
        mlflow = _import()
        self._mlflow, self._failures = mlflow, 0
        try:
            self._client = mlflow.MlflowClient(tracking_uri=tracking)
            self._id = self._find(tracking, storage.join(run, MLFLOW_NAME), name)
            self._client.update_run(self._id, status="RUNNING")
            self._describe(_flat(parameters))
        except (mlflow.exceptions.MlflowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"train.mlflow {tracking!r} cannot be used: {reason}") from error
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mlflow")

    def _find(self, tracking: str, record: str, name: str) -> str:
        """The id of the run's own MLflow run; a new one where there is none yet at this address."""
        if storage.exists(record):
            known = storage.read_json(record)
            if known["tracking"] == tracking:
                return known["run_id"]
            logger.warning("%s names the MLflow at %s, train.mlflow is %s: a new MLflow run", record, known, tracking)
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        number = experiment.experiment_id if experiment else self._client.create_experiment(EXPERIMENT)
        run_id = self._client.create_run(number, run_name=name).info.run_id
        storage.write_json(record, {"tracking": tracking, "run_id": run_id})
        return run_id

    def _describe(self, parameters: dict[str, str]) -> None:
        known = self._client.get_run(self._id).data.params
        entities = self._mlflow.entities
        new = [entities.Param(key, value) for key, value in parameters.items() if key not in known]
        for start in range(0, len(new), _BATCH):
            self._client.log_batch(self._id, params=new[start : start + _BATCH])
        for key, value in parameters.items():
            if known.get(key, value) != value:
                self._client.set_tag(self._id, f"changed.{key}", value)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Send one line of metrics, in the background."""
        now = int(time.time() * 1000)
        metrics = [
            self._mlflow.entities.Metric(_FORBIDDEN.sub("_", f"{kind}/{key}"), float(value), now, step)
            for key, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        ]
        self._pool.submit(self._send, metrics)

    def _send(self, metrics: list[Any]) -> None:
        try:
            self._client.log_batch(self._id, metrics=metrics)
        except (self._mlflow.exceptions.MlflowException, OSError) as error:
            self._failures += 1
            if self._failures == 1:
                logger.warning("MLflow did not take a line of metrics; training goes on: %s", error)

    def close(self) -> None:
        """Send what is left and mark the MLflow run as finished."""
        self._pool.submit(self._finish)
        self._pool.shutdown()
        if self._failures:
            logger.warning("MLflow did not take %d lines of metrics; metrics.jsonl has them", self._failures)

    def _finish(self) -> None:
        try:
            self._client.set_terminated(self._id)
        except (self._mlflow.exceptions.MlflowException, OSError) as error:
            logger.warning("MLflow still shows the run as running: %s", error)


def check_installed() -> None:
    """Raise the ValueError of `MlflowTracker` where MLflow is absent."""
    _import()


def _import() -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        for part in ("mlflow.entities", "mlflow.exceptions"):
            importlib.import_module(part)
        return importlib.import_module("mlflow")
    except ImportError as error:
        raise ValueError(
            f"train.mlflow is set and MLflow is not installed ({error}): pip install mlflow-skinny, or train.mlflow="
        ) from error


def _flat(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)[:_MAX_PARAMETER]
    return flat
