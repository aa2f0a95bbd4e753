"""A run directory that is written as a run writes it, told to trackers as a driver tells them."""

import json
from contextlib import contextmanager

from kat_ray.config.load import config_yaml, load_config
from kat_ray.config.tracking import TrackingConfig
from kat_ray.observability.trackers import Trackers
from kat_ray.run.jsonl_tracker import JsonlTracker
from kat_ray.tracking.choice import service_trackers

EVALUATION = {"avg_at_k": 0.5, "pass_at_k": 1.0, "k": 2, "mean_length": 7.0, "ran_out": 0}
SUMMARY = {"steps": 8, "generated_tokens": 1234, "eval_after": {"avg_at_k": 0.75}}


class TrackedRun:
    """`folder` is the run's directory."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        (folder / "config.yaml").write_text(config_yaml(load_config("demo")))
        (folder / "metrics.jsonl").touch()
        self.said = []

    @contextmanager
    def driver(self, *names, own=(), **settings):
        """One process of the run: its trackers, of these names and `own`."""
        given = service_trackers(TrackingConfig(to=names, **settings), names, self.folder, self.said.append)
        with Trackers([JsonlTracker(self.folder), *given, *own]) as trackers:
            yield trackers

    def go_back(self, trackers, done):
        """To the checkpoint after `done` steps."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (self.folder / "metrics.jsonl").write_text("".join(x for x in lines if json.loads(x)["step"] <= done))
        (self.folder / "summary.json").unlink(missing_ok=True)
        trackers.start(done)

    def steps(self, trackers, first, last, scale=1.0, evaluated=()):
        """Steps `first` to `last`, with a KL of a tenth of the step times `scale`."""
        for step in range(first, last + 1):
            trackers.step(step, {"kl/mean": step / 10 * scale, "learner/grad_norm": float("nan")})
            if step in evaluated:
                trackers.evaluation(step, EVALUATION)

    def finish(self, trackers):
        """The run comes to its end."""
        (self.folder / "summary.json").write_text(json.dumps(SUMMARY))
        trackers.finish(SUMMARY, {})

    def interrupted_and_resumed(self, *names, **settings):
        """Steps 1 to 5, an evaluation after 4; resumed from 3, up to 8, with other values for what comes again."""
        with self.driver(*names, **settings) as trackers:
            trackers.start(0)
            self.steps(trackers, 1, 5, evaluated=[4])
        with self.driver(*names, **settings) as trackers:
            self.go_back(trackers, 3)
            self.steps(trackers, 4, 8, scale=100.0, evaluated=[4, 8])
            self.finish(trackers)


# What a tracker is to show of `interrupted_and_resumed`: steps 4 and 5 as they were the first time.
KL = {step: step / 10 * (1.0 if step <= 5 else 100.0) for step in range(1, 9)}
ACCURACY = {4: 0.5, 8: 0.5}
