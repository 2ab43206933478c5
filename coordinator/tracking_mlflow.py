"""A run's numbers and settings in MLflow; imported only where MLFLOW_TRACKING_URI is set."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from edge_teacher.contract.errors import CheckFailed, UsageError
from edge_teacher.files import write_atomically

_EXPERIMENT = "fedsa"
_FILE = "mlflow.json"
_SEND_EVERY_S = 10.0
_MOST_AT_ONCE = 1000
"""MLflow's own limit for one request."""


class _Kept(msgspec.Struct, frozen=True):
    """Which run of which server this one is."""

    uri: str
    run: str


class MlflowRun:
    """A Sink. Numbers are sent together every few seconds, since a server may be far away."""

    name = "MLflow"

    def __init__(self, uri: str, folder: Path, name: str, settings: Mapping[str, str]) -> None:
        """Raises UsageError if the package is missing, CheckFailed if the server refuses."""
        # What is down for minutes is no reason to wait for it between two steps.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        # Its reports of its use to its makers are not the user's wish until they say so.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise UsageError(
                f"MLFLOW_TRACKING_URI is {uri!r}, and the package for it is not installed "
                f"({error.name}); pip install 'fedsa-edge[mlflow]', or unset the variable"
            ) from error
        self._waiting: list[Any] = []
        self._sent_at = time.monotonic()
        try:
            self._client = MlflowClient(tracking_uri=uri)
            self._run = self._open(uri, folder / _FILE, name, settings)
        except MlflowException as error:
            raise CheckFailed(
                f"MLflow at {uri} cannot be used: {str(error).splitlines()[0]}; "
                "see to it, or unset MLFLOW_TRACKING_URI"
            ) from error

    def _open(self, uri: str, path: Path, name: str, settings: Mapping[str, str]) -> str:
        if path.exists():
            kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
            if kept.uri == uri:
                self._client.update_run(kept.run, status="RUNNING")
                return kept.run
        found = self._client.get_experiment_by_name(_EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(_EXPERIMENT)
        run: str = self._client.create_run(experiment, run_name=name).info.run_id
        for key, value in settings.items():
            self._client.log_param(run, key, value)
        write_atomically(path, msgspec.json.encode(_Kept(uri, run)))
        return run

    def begin(self, step: int) -> None:
        # What an earlier process sent of later steps is sent again, with the same numbers.
        pass

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = time.time()
        self._waiting += [Metric(k, v, int(now * 1000), step) for k, v in values.items()]
        if time.monotonic() - self._sent_at >= _SEND_EVERY_S:
            self._send()

    def end(self, *, failed: bool) -> None:
        self._send()
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), _MOST_AT_ONCE):
            batch = waiting[start : start + _MOST_AT_ONCE]
            self._client.log_batch(self._run, metrics=batch)
        self._sent_at = time.monotonic()
