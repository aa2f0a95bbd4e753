"""A tracker's process: `python -m kat_ray.tracking.follow '{"service": "wandb", "run": DIR, ...}'`.

It reads lines on standard input, which say that there is something to read, and how often the records were cut
back (`tracker`), and reads it where the run keeps it: metrics.jsonl, and summary.json at the end. So the driver
never waits for it, and a process that begins in the middle of a run, or after it, tells all of it. It writes
`["at", place]` once its run is open, and `["failed", reason]` if its package raises. When its input ends, it hands
over what is left and ends.

Nothing is told twice. What a run takes again after it has gone back to a checkpoint was told the first time, and
stays as it was told: no tracker but TensorBoard can take back a value. How far it has come is in
RUN/tracking/SERVICE.json, or SERVICE-online.json, after each round; another server is told everything.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from kat_ray.config import plain_yaml
from kat_ray.observability.redact import redact
from kat_ray.run.directory import METRICS
from kat_ray.tracking.service import Service, Shown

SERVICES = {  # by name: module and class
    "wandb": ("kat_ray.tracking.wandb_service", "WandbService"),
    "mlflow": ("kat_ray.tracking.mlflow_service", "MlflowService"),
    "trackio": ("kat_ray.tracking.trackio_service", "TrackioService"),
    "swanlab": ("kat_ray.tracking.swanlab_service", "SwanlabService"),
}
LAST_SECONDS = 60  # after the end of its input; a package that takes longer is ended with its process
_SPARE_SECONDS = 30
_ROUND = 50  # lines that are told between two notes of how far it has come
_LONGEST_TEXT = 500  # characters of a reason


@dataclass
class Told:
    """The last step of each kind that a tracker was told at a place."""

    step: int = -1
    evaluation: int = -1
    place: str = ""

    def is_new(self, step: int, kind: str) -> bool:
        """Whether this is the first time; it counts as told from now on."""
        new = bool(step > getattr(self, kind))
        if new:
            setattr(self, kind, step)
        return new


class Follower:
    """Tells a service what a run's records hold, each line once."""

    def __init__(self, service: Service, run: Path, note: Path) -> None:
        """`note` is where it keeps how far it has come."""
        self._service, self._metrics, self._summary, self._note = service, run / METRICS, run / "summary.json", note
        told = Told(**json.loads(note.read_text(encoding="utf-8"))) if note.is_file() else Told()
        self._told = told if told.place == service.place else Told(place=service.place)
        self._position, self._generation = 0, 0

    def catch_up(self, generation: int) -> None:
        """Tell what is new. The records were cut back `generation` times: what is behind may have changed since."""
        if generation != self._generation or generation < 0:
            self._position, self._generation = 0, generation
        for count, line in enumerate(self._lines(), 1):
            self._tell(line)
            if not count % _ROUND:
                self._keep()
        self._keep()

    def end(self) -> None:
        """Tell what is left, whatever was said of it; with the summary, which a run has that came to its end."""
        self.catch_up(-1)
        text = self._summary.read_text(encoding="utf-8") if self._summary.is_file() else "null"
        self._service.end(json.loads(text))

    def _lines(self) -> Iterator[Mapping[str, Any]]:
        """New whole lines; what is no record is passed over, and half a line is read when it is whole."""
        with self._metrics.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._position += len(line)
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    yield record

    def _tell(self, line: Mapping[str, Any]) -> None:
        values = {
            name: float(value)
            for name, value in line.items()
            if "/" in name and isinstance(value, int | float) and not isinstance(value, bool)
        }
        kind = "evaluation" if any(name.startswith("eval/") for name in values) else "step"
        if values and self._told.is_new(line["step"], kind):
            self._service.log(line["step"], values, float(line.get("time") or 0.0))

    def _keep(self) -> None:
        partial = self._note.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self._told)), encoding="utf-8")
        partial.replace(self._note)


def serve(order: Mapping[str, Any], requests: TextIO, say: Callable[..., None]) -> None:
    """Follow the run until the requests end."""
    run, name = Path(order["run"]), str(order["service"])
    folder = run / "tracking"
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        _wait_for(lock, name)
        module, kind = SERVICES[name]
        service: Service = getattr(import_module(module), kind)()
        node = plain_yaml.compose((run / "config.yaml").read_text(encoding="utf-8"))
        tree = {} if node is None else plain_yaml.construct(node)
        at = service.open(Shown(order["id"], run.name, order["project"], tree, folder, order["online"]))
        say("at", redact(at))
        follower = Follower(service, run, folder / f"{name}{'-online' if order['online'] else ''}.json")
        for line in requests:
            follower.catch_up(int(line))
        signal.alarm(LAST_SECONDS)  # its driver has ended, or is about to end it
        follower.end()


def _wait_for(lock: TextIO, name: str) -> None:
    """Of a driver that was killed, the tracker may still be at its last lines."""
    end = time.monotonic() + LAST_SECONDS + _SPARE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise RuntimeError(f"another process tells {name} of this run") from None
            time.sleep(0.1)


def main() -> None:
    """Serve; a failure is said, and is exit code 1."""
    os.environ.update({"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "HF_HUB_DISABLE_TELEMETRY": "1"})
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # what a package prints might hold anything
        os.dup2(nothing, descriptor)

    def say(*what: str) -> None:
        print(json.dumps(what), file=replies, flush=True)

    try:
        serve(json.loads(sys.argv[1]), requests, say)
    except BaseException as error:  # whatever a package raises: the driver is to say it
        say("failed", redact(f"{type(error).__name__}: {error}")[:_LONGEST_TEXT])
        os._exit(1)  # not through what the package has left to do at exit


if __name__ == "__main__":
    main()
