"""A training run from configuration to summary: checks, actors, the loop, the records."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from actors.cluster.placement import Placement
from actors.cluster.preflight import named_address
from actors.cluster.run_actors import RunActors
from actors.cluster.samplers import Engines, SamplerGroup
from actors.cluster.session import ray_session
from actors.cluster.signals import Preempted, StopRequest
from actors.cluster.supervisor import Supervisor
from actors.driver.agreement import Agreement, AgreementCheck
from actors.driver.preparation import Prepared, checkpoints_of, make_evaluator, prepare
from actors.driver.training_run import TrainingRun
from actors.learner.schedule import schedule_note
from kat_ray.cluster.machine import free_memory
from kat_ray.config import Config
from kat_ray.config.environment import unused_environment
from kat_ray.config.load import config_yaml
from kat_ray.config.rule_warnings import rule_warnings
from kat_ray.errors import Stopped
from kat_ray.models.cpu_dtypes import cpu_flags, slow_dtypes
from kat_ray.models.memory import gpu_memory, memory_notes
from kat_ray.models.revisions import pinned, pinned_like
from kat_ray.models.tolerance import dtype_note
from kat_ray.observability.logs import name_driver
from kat_ray.observability.progress import Progress
from kat_ray.rewards.verifiers import EvalResult
from kat_ray.run.checkpoint import Loaded, unread
from kat_ray.run.directory import RunDirectory
from kat_ray.run.resume import check_prompts, run_config, unfinished_run
from kat_ray.run.reward_functions import changed_files, check_sources, has_functions, try_functions
from kat_ray.run.stored_run import check_place, open_run
from kat_ray.storage.address import Place
from kat_ray.tracking.choice import check_trackers

log = logging.getLogger("kat_ray.run")


def train(config: Config, resume: Place | None = None, engines: Engines | None = None) -> Place:
    """Run the whole job, or go on with the run `resume`; returns the run's directory, or its address in a bucket.

    `Stopped` if the process was told to end: the run can be resumed.
    """
    started = time.monotonic()
    if resume is None:
        check_place(config.run)  # before models and data are read
        resume = unfinished_run(config)
    before = None if resume is None else run_config(resume)
    config = pinned(config if before is None else pinned_like(config, before))
    check_sources(config)
    check_trackers(config.tracking, config.trackers)
    prepared = prepare(config)
    if has_functions(config):
        try_functions(config, prepared.train, prepared.facts.tokenizer.encode)
    run = open_run(config.run, resume, config_yaml(config))
    stop = StopRequest(config.run.grace_seconds)
    with run, Progress(config.run.steps) as progress:
        loaded, notes = (None, []) if before is None else _newest(run, before, config, prepared)
        for note in (*notes, *_notes(config, prepared)):
            progress.note(note)
        log.info("run %s: %d prompts", run.home, len(prepared.train.prompts))
        progress.phase("starting Ray")
        with _placement(config, run.home.name, progress) as placement:
            training = TrainingRun(config, prepared, placement, run, progress, stop, engines or Engines())
            try:
                training.run(started, loaded)
            except Preempted:
                assert stop.signal is not None
                words = f"stopped; go on with: kat-ray train --resume {run.home}"
                raise Stopped(words, 128 + stop.signal) from None
    return run.home


def _newest(
    run: RunDirectory, before: Config, config: Config, prepared: Prepared
) -> tuple[Loaded | None, list[str]]:
    """The checkpoint that a run goes on from, and what to say of it; the run is locked."""
    checkpoints = run.checkpoints or checkpoints_of(run.path, config.run)
    loaded, notes = checkpoints.newest(unread)  # the ranks read it before they load it
    if loaded is None:
        return None, [*notes, f"{run.home}: no checkpoint yet, starting anew"]
    check_prompts(run.home, loaded.state.get("prompts", {}), prepared.prompt_sets())
    changed = changed_files(loaded.state.get("reward_files", {}), prepared.reward_files)
    notes = [*notes, f"resuming {run.home} after step {loaded.step}", *changed]
    if (note := schedule_note(before, config, loaded.step)) is not None:
        notes.append(note)
    return loaded, notes


def _notes(config: Config, prepared: Prepared) -> Iterator[str]:
    yield from prepared.facts.warnings
    for split in (prepared.train, prepared.heldout):
        if split is not None and split.skipped_too_long:
            yield f"{split.source}: {split.skipped_too_long} prompts are too long and were skipped"
        if split is not None and split.repeated:
            other = f", {split.contradicting} of them with another answer" if split.contradicting else ""
            yield f"{split.source}: {split.repeated} prompts repeat another{other}, and were left out (data.dedupe)"
    if (few := len(prepared.train.prompts)) < config.rollout.prompts_per_step:
        yield (
            f"{prepared.train.source}: {few} prompts, and a step takes rollout.prompts_per_step = "
            f"{config.rollout.prompts_per_step}: it has the same ones several times"
            + (", and all rollouts of one are one group" if config.objective.rl.weight else "")
        )
    if config.reward.functions and not config.objective.rl.weight:
        yield "reward.functions is not used: objective.rl.weight = 0"
    if (note := unused_environment(config.environment, config.data.path)) is not None:
        yield note
    if prepared.golds.note:
        yield prepared.golds.note
    if (note := dtype_note(config.student.dtype, config.learner.dtype)) is not None:
        yield note
    if named_address(config) is None:  # else the models are loaded elsewhere
        yield from slow_dtypes(config, cpu_flags())
        longest = prepared.train.longest + config.rollout.max_tokens
        yield from memory_notes(config, prepared.facts, longest, free_memory(), gpu_memory())
    for warning in rule_warnings(config):
        yield f"termination: {warning}"


def evaluate_model(config: Config, model_dir: str) -> EvalResult:
    """avg@k and pass@k of a model directory on the configuration's held-out problems."""
    if model_dir != config.student.path:  # the revision is that of the student
        changes = {"path": model_dir, "revision": None}
        config = config.model_copy(update={"student": config.student.model_copy(update=changes)})
    config = pinned(config)
    name_driver(config.run.name)
    prepared = prepare(config, ask_servers=False)
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


def check_agreement(config: Config, engines: Engines | None = None) -> list[Agreement]:
    """Start all engines of a configuration, compare what they compute, and end them; nothing is written.

    `AgreementError` for the first two that do not agree.
    """
    name_driver(config.run.name)
    config = pinned(config)
    prepared = prepare(config)
    stop = StopRequest(config.run.grace_seconds)
    with Progress(config.run.steps) as progress, stop.listening():
        progress.phase("starting Ray")
        with _placement(config, config.run.name, progress) as placement:
            progress.phase("loading models")
            actors = RunActors.make(config, prepared.paths, placement, stop, engines or Engines())
            actors.begin_loading()
            actors.samplers.use_student()
            actors.wait_until_ready()
            progress.phase("checking that all engines compute the same models")
            return AgreementCheck(config, prepared, actors).run(0)


@contextmanager
def _placement(config: Config, run: str, progress: Progress) -> Iterator[Placement]:
    with ray_session(config) as fixed_size:
        progress.phase("placing actors")
        placement = Placement(config, fixed_size, run)
        try:
            yield placement
        finally:
            placement.remove()
