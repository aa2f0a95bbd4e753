"""A training run from configuration to summary: checks, actors, the loop, the records."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actors.cluster.placement import Placement
from actors.cluster.samplers import Engines, SamplerGroup
from actors.cluster.session import ray_session
from actors.cluster.signals import Preempted, StopRequest
from actors.cluster.supervisor import Supervisor
from actors.driver.preparation import Prepared, checkpoints_of, make_evaluator, prepare
from actors.driver.training_run import TrainingRun
from kat_ray.config import Config
from kat_ray.config.load import config_yaml
from kat_ray.config.rule_warnings import rule_warnings
from kat_ray.errors import Stopped
from kat_ray.observability.logs import name_driver
from kat_ray.observability.progress import Progress
from kat_ray.rewards.verifiers import EvalResult
from kat_ray.run.checkpoint import Loaded, unread
from kat_ray.run.directory import RunDirectory
from kat_ray.run.resume import check_prompts, unfinished_run

log = logging.getLogger("kat_ray.run")


def train(config: Config, resume: Path | None = None, engines: Engines | None = None) -> Path:
    """Run the whole job, or go on with the run in the directory `resume`; returns the run directory.

    `Stopped` if the process was told to end: the run can be resumed.
    """
    started = time.monotonic()
    resume = resume or unfinished_run(config)
    prepared = prepare(config)
    if resume is None:
        run = RunDirectory.create(config.run, config_yaml(config))
    else:
        run = RunDirectory.reopen(resume, config_yaml(config))
    stop = StopRequest(config.run.grace_seconds)
    with run, Progress(config.run.steps) as progress:
        loaded, notes = (None, []) if resume is None else _newest(resume, config, prepared)
        for note in (*notes, *_notes(config, prepared)):
            progress.note(note)
        log.info("run %s: %d prompts", run.path, len(prepared.train.prompts))
        progress.phase("starting Ray")
        with _placement(config, run.path.name, progress) as placement:
            training = TrainingRun(config, prepared, placement, run, progress, stop, engines or Engines())
            try:
                training.run(started, loaded)
            except Preempted:
                assert stop.signal is not None
                words = f"stopped; go on with: kat-ray train --resume {run.path}"
                raise Stopped(words, 128 + stop.signal) from None
    return run.path


def _newest(run: Path, config: Config, prepared: Prepared) -> tuple[Loaded | None, list[str]]:
    """The checkpoint that a run goes on from, and what to say of it; the run is locked."""
    loaded, notes = checkpoints_of(run, config.run).newest(unread)  # the ranks read it before they load it
    if loaded is None:
        return None, [*notes, f"{run}: no checkpoint yet, starting anew"]
    check_prompts(run, loaded.state.get("prompts", {}), prepared.prompt_sets())
    return loaded, [*notes, f"resuming {run} after step {loaded.step}"]


def _notes(config: Config, prepared: Prepared) -> Iterator[str]:
    yield from prepared.facts.warnings
    for split in (prepared.train, prepared.heldout):
        if split is not None and split.skipped_too_long:
            yield f"{split.source}: {split.skipped_too_long} prompts are too long and were skipped"
    for warning in rule_warnings(config):
        yield f"termination: {warning}"


def evaluate_model(config: Config, model_dir: str) -> EvalResult:
    """avg@k and pass@k of a model directory on the configuration's held-out problems."""
    config = config.model_copy(update={"student": config.student.model_copy(update={"path": model_dir})})
    name_driver(config.run.name)
    prepared = prepare(config)
    evaluator = make_evaluator(config, prepared)
    if evaluator is None:
        raise ValueError("evaluation.data is empty: name the held-out problems")
    with ray_session(config) as fixed_size:
        placement = Placement(config, fixed_size, config.run.name, only=["sampler"])
        try:
            supervisor = Supervisor(config.cluster, StopRequest(config.run.grace_seconds))
            samplers = SamplerGroup(config, prepared.paths, supervisor, placement)
            samplers.use_student()
            return evaluator.run(samplers)
        finally:
            placement.remove()


@contextmanager
def _placement(config: Config, run: str, progress: Progress) -> Iterator[Placement]:
    with ray_session(config) as fixed_size:
        progress.phase("placing actors")
        placement = Placement(config, fixed_size, run)
        try:
            yield placement
        finally:
            placement.remove()
