"""MLflow: a server (MLFLOW_TRACKING_URI), or offline a SQLite store that one can show, RUN/tracking/mlflow.db."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from kat_ray.observability.redact import redact
from kat_ray.tracking.service import Service, Shown, flat

RUN_ID = "kat_ray.run_id"  # the tag by which a resumed run is found
_PARAMS, _METRICS, _LONGEST = 100, 1000, 6000  # of a request: MLflow's limits; characters of a value


class MlflowService(Service):
    """`MlflowClient` alone: nothing of machine, code or user is collected."""

    def open(self, shown: Shown) -> str:
        """The run that has our id in a tag, or a new one. MLflow changes no parameter's first value."""
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        uri = os.environ["MLFLOW_TRACKING_URI"] if shown.online else f"sqlite:///{shown.folder / 'mlflow.db'}"
        self.place = redact(uri) if shown.online else ""
        self._client = client = MlflowClient(tracking_uri=uri)
        place = None if shown.online else (shown.folder / "mlflow-artifacts").as_uri()
        experiment = _experiment(client, shown.project, place)
        found = client.search_runs([experiment], f"tags.`{RUN_ID}` = '{shown.id}'")
        run = found[0] if found else client.create_run(experiment, run_name=shown.name, tags={RUN_ID: shown.id})
        self._id = run.info.run_id
        client.update_run(self._id, status="RUNNING")
        new = {n: str(v)[:_LONGEST] for n, v in flat(shown.config).items() if n not in run.data.params}
        params = [Param(name, value) for name, value in new.items()]
        for first in range(0, len(params), _PARAMS):
            client.log_batch(self._id, params=params[first : first + _PARAMS])
        client.log_dict(self._id, dict(shown.config), "config.json")
        return f"run {self._id} of experiment {shown.project} at {uri}"

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """One request, which MLflow takes whole."""
        from mlflow.entities import Metric

        at = int(seconds * 1000)
        self._client.log_batch(self._id, metrics=[Metric(n, v, at, step) for n, v in values.items()][:_METRICS])

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """The summary as an artifact; FINISHED, or KILLED where the run may be resumed."""
        from mlflow.entities import RunTag

        if summary is not None:
            self._client.log_dict(self._id, dict(summary), "summary.json")
            self._client.log_batch(self._id, tags=[RunTag("kat_ray.steps", str(summary.get("steps")))])
        self._client.set_terminated(self._id, status="FINISHED" if summary is not None else "KILLED")


def _experiment(client: Any, name: str, place: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location=place))
    except MlflowException:  # another run made it meanwhile
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)
