"""A training run from configuration to summary: checks, actors, the loop, the records."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actors.cluster.placement import Placement, ray_session
from actors.cluster.sampler_pool import Engines, ModelPaths, SamplerPool
from actors.cluster.waiting import Preempted, StopRequest
from actors.driver.run import Job, Prepared, checkpoints_of, make_evaluator
from kat_ray.config import Config, DataConfig
from kat_ray.config.load import config_yaml
from kat_ray.config.rule_warnings import rule_warnings
from kat_ray.data.prompts import PromptSet, load_prompts
from kat_ray.errors import Stopped
from kat_ray.models.inspect import check_models, resolve_model
from kat_ray.observability.logs import name_driver
from kat_ray.observability.progress import Progress
from kat_ray.rewards.verifiers import EvalResult, check_golds
from kat_ray.run.checkpoint import Loaded
from kat_ray.run.directory import RunDirectory
from kat_ray.run.resume import check_prompts, unfinished_run
from kat_ray.termination import RunFacts, make_rule

log = logging.getLogger("kat_ray.run")


def prepare(config: Config) -> Prepared:
    """Check models and data; `UserError` names what is wrong."""
    facts = check_models(config)
    # A rule that cannot be made says so now, not in the monitor.
    make_rule(config.termination, RunFacts(config.run.seed, config.rollout.max_tokens))

    def prompts(data: DataConfig, max_tokens: int, graded: bool) -> PromptSet:
        return load_prompts(data, facts.tokenizer, facts.max_prompt_tokens(max_tokens), graded=graded)

    train = prompts(config.data, config.rollout.max_tokens, False)
    heldout = None
    longest = train.longest + config.rollout.max_tokens
    if config.evaluation.data is not None:
        heldout = prompts(config.evaluation.data, config.eval_max_tokens, True)
        check_golds(heldout.prompts, config.evaluation.verifier)
        longest = max(longest, heldout.longest + config.eval_max_tokens)
    paths = ModelPaths(
        student_dir=resolve_model(config.student),
        teacher_dir=resolve_model(config.teacher),
        stop_ids=facts.stop_ids,
        student_stop_ids=facts.student.stop_ids,
        vocabulary=facts.student.vocabulary,
        max_model_len=longest,
    )
    return Prepared(facts, train, heldout, paths)


def train(config: Config, resume: Path | None = None, engines: Engines | None = None) -> Path:
    """Run the whole job, or go on with the run in the directory `resume`; returns the run directory.

    `Stopped` if the process was told to end: the run can be resumed.
    """
    started = time.monotonic()
    resume = resume or unfinished_run(config)
    prepared = prepare(config)
    loaded: Loaded | None = None
    notes: list[str] = []
    if resume is None:
        run = RunDirectory.create(config.run, config_yaml(config))
    else:
        loaded, notes = checkpoints_of(resume, config.run).newest()
        first = loaded.step if loaded else 0
        notes.append(
            f"resuming {resume} after step {first}" if first else f"{resume}: no checkpoint yet, starting anew"
        )
        if loaded is not None:
            check_prompts(resume, loaded.state.get("prompts", {}), prepared.prompt_sets())
        run = RunDirectory.reopen(resume, config_yaml(config))
    stop = StopRequest(config.run.grace_seconds)
    with run, Progress(config.run.steps) as progress:
        for note in (*notes, *_notes(config, prepared)):
            progress.note(note)
        log.info("run %s: %d prompts", run.path, len(prepared.train.prompts))
        progress.phase("starting Ray")
        with _placement(config, run.path.name, progress) as placement:
            job = Job(config, prepared, placement, run, progress, stop, engines or Engines())
            try:
                job.run_all(started, loaded)
            except Preempted:
                assert stop.signal is not None
                words = f"stopped; go on with: kat-ray train --resume {run.path}"
                raise Stopped(words, 128 + stop.signal) from None
    return run.path


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
            samplers = SamplerPool(config, prepared.paths, placement, StopRequest(config.run.grace_seconds))
            samplers.use_samplers(config.student, prepared.paths.student_dir, "sampler")
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
