"""A small run on a fake cluster: what is done to it, what comes of it, and what must be so whatever was done.

Replay a schedule with `python -m tests.support.scenarios --seed N --schedule 400:kill:scorer:0,...`.

The one place that knows how a run is put together from the classes of `actors` is `build`.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

from actors.cluster.draining import LEARNER, Draining, DrainWatch
from actors.cluster.object_store import StoreUsage, StoreWatch
from actors.cluster.samplers import Engines, ModelPaths
from actors.cluster.signals import Preempted, StopRequest
from actors.driver.preparation import Prepared
from actors.driver.training_run import TrainingRun
from kat_ray.cluster.roles import roles_of
from kat_ray.config import Config
from kat_ray.data.golds import TrainingGolds
from kat_ray.data.prompts import PromptSet
from kat_ray.errors import UserError
from kat_ray.observability.trackers import Trackers
from kat_ray.types.records import DEFAULT_TEACHER, Prompt
from tests.support.fake_cluster import FakeCluster, FakePlacement
from tests.support.memory_learner import MemoryLearner, World
from tests.support.memory_records import MemoryCheckpoints, MemoryRun, MemoryTracker
from tests.support.quick_engines import QuickTeacher, make_engine, quick_compare, quick_rows

PLAIN: dict[str, dict[str, Any]] = {
    "run": {"steps": 3, "checkpoint_every": 2, "grace_seconds": 30.0},
    "student": {"path": "student"},
    "teacher": {"path": "teacher"},
    "data": {"path": "unused.jsonl"},
    "rollout": {
        "prompts_per_step": 4, "rollouts_per_prompt": 2, "max_tokens": 16, "chunk_tokens": 3, "max_chunks_ahead": 2,
        "top_k_logprobs": 4,
    },
    "termination": {
        "rule": "kat", "window": 3, "consecutive": 2, "exempt": 1, "min_samples": 4, "min_steps": 1, "eta": 0.3,
        "probe_share": 0.3,
    },
    "sampler": {"replicas": 2},
    "scorer": {"replicas": 2},
    "learner": {"world_size": 1},
    "cluster": {
        "hang_timeout": 20.0, "start_timeout": 60.0, "step_timeout": 200.0, "replacement_timeout": 20.0,
        "max_restarts": 5,
    },
}  # fmt: skip


def config_of(changes: Mapping[str, Mapping[str, Any]] | None = None) -> Config:
    """The small run, with these fields changed."""
    sections = dict(PLAIN)
    for name, values in (changes or {}).items():
        whole = values is None or "rule" in values
        sections[name] = values if whole else {**sections.get(name, {}), **values}
    return Config.model_validate(sections)


class PromptDrainWatch(DrainWatch):
    """Looks when it is asked, and not in a thread of its own: time is virtual."""

    def __init__(self, cluster: FakeCluster, _ask: Any) -> None:
        super().__init__(
            lambda: [Draining(name, (LEARNER,), None) for name in sorted(cluster.draining) if "learner" in name]
        )

    def __enter__(self) -> DrainWatch:
        return self

    @property
    def is_pressing(self) -> bool:
        self.look()
        return super().is_pressing


@dataclass
class Result:
    """What came of a run."""

    cluster: FakeCluster
    run: MemoryRun
    checkpoints: MemoryCheckpoints
    notes: list[str] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)
    error: BaseException | None = None
    roles: frozenset[str] = frozenset()  # that the configuration asks for
    filters: bool = False  # rollouts of constant groups are in no loss

    @property
    def finished(self) -> bool:
        return self.run.summary is not None

    def fingerprint(self) -> dict[str, Any]:
        """What must not depend on what was done to the run: rows kept, cuts, calibration, weights."""
        steps = {}
        for step, rows in sorted(self.run.traces.items()):
            steps[step] = [_row(row) for row in rows]
        written = sorted(self.checkpoints.written.items())
        states = {step: (json.loads(state)["rule"], weights) for step, (state, weights) in written}
        return {"rows": steps, "states": states}


def _row(row: Any) -> tuple[Any, ...]:
    kept, policy = len(row.token_ids) if row.cut is None else row.cut, row.policy
    rewarded: Any = None
    if policy is not None:
        rewarded = {f.name: getattr(policy, f.name) for f in fields(policy)}
        rewarded["sampled_logprobs"] = tuple(policy.sampled_logprobs[: policy.policy_tokens].tolist())
        learner = policy.learner_logprobs
        rewarded["learner_logprobs"] = None if learner is None else tuple(learner.tolist())
    return (
        row.rollout_id, str(row.stop_reason), row.cut, row.confirmed, row.threshold, row.minimum, row.probe,
        row.would_cut, tuple(row.token_ids[:kept].tolist()), tuple(row.d[:kept].tolist()), rewarded, row.teacher,
    )  # fmt: skip


class Run:
    """A run and its cluster: name what is to happen to it, then `go`."""

    def __init__(
        self,
        seed: int = 0,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
        start_from: Result | None = None,
    ) -> None:
        self.changes = changes
        self.config = config_of(changes)
        self.cluster = FakeCluster(seed)
        self.world = World()
        self.records = MemoryRun()
        self.checkpoints = MemoryCheckpoints(self.world)
        self.notes: list[str] = []
        if start_from is not None:
            self.records, self.checkpoints = start_from.run, start_from.checkpoints
            self.checkpoints._world = self.world
            for step, (_, weights) in self.checkpoints.written.items():
                self.world.disk[f"/nowhere/run/checkpoints/step-{step}"] = weights
        self.job: Any = None
        self.held: dict[str, int] = {}  # rollouts that an actor still has at the end
        self.golds = GOLDS if self.config.objective.rl.weight else {}
        self.engine: Any = functools.partial(make_engine, bool(self.config.rollout.staleness))

    def disturb(self, schedule: Sequence[tuple[int, str, str]]) -> Run:
        """Have things happen at switches of the schedule, such as (400, "kill", "scorer:0")."""
        for switch, what, whom in schedule:
            do = getattr(self.cluster, what)
            act = do if what == "terminate" else functools.partial(do, whom)
            self.cluster.scheduler.agenda.setdefault(switch, []).append(act)
        return self

    def go(self) -> Result:
        """Run it to its end, whatever that is; raises what is no documented end."""
        result = Result(self.cluster, self.records, self.checkpoints, self.notes, self.held)
        result.roles = frozenset(roles_of(self.config))
        rl = self.config.objective.rl
        result.filters = rl.filter_constant_groups and not self.config.used_teachers
        with ExitStack() as stack:
            for where, what in self._replaced().items():
                stack.enter_context(mock.patch(where, what))
            try:
                self.cluster.run(self._drive)
            except (UserError, Preempted) as error:
                result.error = error
        return result

    def _drive(self) -> None:
        self.job = self.build()
        loaded, _ = self.checkpoints.newest()
        self.job.run(0.0, loaded)
        time.sleep(10)  # until the last messages have arrived
        for role, count in (("scorer", "states"), ("monitor", "open_rollouts")):
            for name, instance in self.cluster.instances(role):
                self.held[name] = instance.stats()[count]

    def build(self) -> Any:
        """The run of today's classes."""
        config = self.config
        paths = ModelPaths(
            "student",
            {g.name: g.model.path for g in config.scorer_groups},
            (1,),
            (1,),
            {g.name: (1,) for g in config.scorer_groups},
            vocabulary=64,
            max_model_len=64,
            scored_len=64,
        )
        numbers = {name: role.replicas for name, role in roles_of(config).items()}
        model = SimpleNamespace(parameters=1)
        tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: str(ids[-1] % 2))
        facts = SimpleNamespace(tokenizer=tokenizer, student=model, models={"student": model})
        progress = SimpleNamespace(
            phase=lambda _: None, training=lambda: None, note=self.notes.append, step=lambda _: None,
            finish=lambda *_: None,
        )  # fmt: skip
        self.stop = StopRequest(config.run.grace_seconds)
        learner = type("OwnLearner", (MemoryLearner,), {"world": self.world})
        engines = Engines(self.engine, QuickTeacher, learner)
        heldout = HELDOUT if config.evaluation.data is not None else None
        prepared: Any = Prepared(facts, prompts_of(config), TrainingGolds(self.golds, None), heldout, paths)
        self.placement: Any = FakePlacement(self.cluster, numbers)
        return TrainingRun(config, prepared, self.placement, self.records, progress, self.stop, engines)

    def _replaced(self) -> dict[str, Any]:
        """What of today's modules a run here does without."""
        return {
            "actors.teacher.scorer.TeacherScorer._compare": quick_compare,
            "actors.teacher.scorer.TeacherScorer._rows": quick_rows,
            "actors.driver.training_run._trackers": lambda *_: Trackers([MemoryTracker(self.records)]),
            "actors.driver.training_run.StoreWatch": functools.partial(
                StoreWatch, ask=lambda: StoreUsage(0.1, 0.0)
            ),
            "actors.driver.training_run.DrainWatch": functools.partial(PromptDrainWatch, self.cluster),
            "actors.driver.history.checkpoints_of": lambda *_: self.checkpoints,
            "actors.driver.training_run.run_summary": lambda _config, totals, *_: totals.as_dict(),
        }


def prompts_of(config: Config) -> PromptSet:
    """The prompts, dealt to the teachers in turn."""
    names = sorted(config.used_teachers) or [DEFAULT_TEACHER]
    dealt = (replace(p, teacher=names[i % len(names)]) for i, p in enumerate(PROMPTS.prompts))
    if config.data.completion_column is not None:
        dealt = (replace(p, completion_ids=(i, 9, *range(i))) for i, p in enumerate(dealt))
    return replace(PROMPTS, prompts=tuple(dealt))


ALONE = "without a teacher"
GIVEN = "given completions"
TWO_TEACHERS = "two teachers"
LIVE, AVERAGE = "the student teaches", "its average teaches"
# Runs of other shapes than the plain one.
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "two of each": {"monitor": {"shards": 2}, "learner": {"world_size": 2}},
    "one scorer": {"sampler": {"replicas": 3}, "scorer": {"replicas": 1}},
    "deterministic": {"run": {"deterministic": True}},
    "rewards": {
        "objective": {"rl": {"weight": 1.0}},
        "rollout": {"temperature": 1.0, "top_p": 1.0},
    },
    ALONE: {
        "teacher": None,
        "objective": {"opd": {"weight": 0.0}, "rl": {"weight": 1.0}},
        "rollout": {"temperature": 1.0, "top_p": 1.0},
        "termination": {"rule": "none"},
        "sampler": {"replicas": 3},
        "learner": {"world_size": 2},
    },
    TWO_TEACHERS: {
        "teachers": {
            "math": {"path": "other"},
            "code": {"path": "other", "weight": 0.5},
            "prose": {"path": "third", "scorer": {"replicas": 1}},
        },
        "data": {"teacher_column": "subject"},
        "termination": {"min_samples": 2},
        "monitor": {"shards": 2},
        "run": {"checkpoint_every": 1},
    },
    LIVE: {
        "teacher": {"path": "student", "weights": "live", "context": "{prompt}"},
        "run": {"checkpoint_every": 1},
    },
    AVERAGE: {
        "teacher": {"path": "student", "weights": "average"},
        "teachers": {"other": {"path": "other"}},
        "data": {"teacher_column": "of"},
        "learner": {"world_size": 2},
        "run": {"checkpoint_every": 1},
    },
    "sampled ahead": {
        "rollout": {"staleness": 1},
        "run": {"checkpoint_every": 1},
        "termination": {
            "rule": "kat",
            "window": 3,
            "exempt": 0,
            "consecutive": 2,
            "min_samples": 4,
            "buffer": 5,
            "min_steps": 1,
            "probe_share": 0.4,
            "budget": 0.4,
        },
    },
    "imputed cuts": {
        "objective": {"rl": {"weight": 1.0, "cut_reward": "probe_mean", "probe_min": 1, "probe_buffer": 4}},
        "rollout": {"temperature": 1.0, "top_p": 1.0, "staleness": 1},
        "run": {"checkpoint_every": 1},
    },
    GIVEN: {
        "data": {"completion_column": "solution"},
        "objective": {"off_policy": {"share": 0.4}},
        "learner": {"world_size": 2},
        "run": {"checkpoint_every": 1},
    },
    "elastic": {
        "sampler": {"replicas": 3, "min_replicas": 1, "max_replicas": 4},
        "scorer": {"replicas": 2, "min_replicas": 1, "max_replicas": 3},
        "cluster": {"hang_timeout": 4.0, "replacement_timeout": 6.0, "max_restarts": 8},
        "pools": {"grow_after": 1, "shrink_after": 1},
    },
}
ROLES = ("sampler:1", "scorer:0", "monitor:0", "learner:0")  # one actor of each role
SMALL = {"prompts_per_step": 3, "max_tokens": 12}  # where thousands are run
HELDOUT = PromptSet(tuple(Prompt(f"h{i}", (50 + i, 40), "1") for i in range(6)), 0, "unused.jsonl")
GOLDS = {f"p{i}": "1" for i in range(5)}  # a rollout whose last token is odd is right
PROMPTS = PromptSet(tuple(Prompt(f"p{i}", (20 + i, 30 + i, 40)) for i in range(5)), 0, "unused.jsonl")


def undisturbed(changes: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """The fingerprint of the plain run."""
    return _undisturbed(json.dumps(changes or {}, sort_keys=True))


@functools.cache
def _undisturbed(changes: str) -> dict[str, Any]:
    sections = json.loads(changes)
    sections["run"] = {**sections.get("run", {}), "checkpoint_every": 1}  # to be compared with any other
    result = Run(0, sections).go()
    assert result.error is None, result.error
    check(result)
    return result.fingerprint()


def small(layout: str) -> dict[str, dict[str, Any]]:
    """A layout with fewer and shorter rollouts."""
    changes = LAYOUTS[layout]
    return {**changes, "rollout": {**changes.get("rollout", {}), **SMALL}}


def check_schedule(
    seed: int,
    schedule: Sequence[tuple[int, str, str]],
    layout: str = "plain",
    trace: Callable[[str], Any] | None = None,
) -> Result:
    """Run a schedule, and check what holds of all of them; one that was told to end is gone on with."""
    changes = small(layout)
    run = Run(seed, changes).disturb(schedule)
    run.cluster.trace = trace
    result = run.go()
    check(result)
    if result.error is not None:
        done = {line.split(":")[1] for line in result.cluster.log}
        assert (
            isinstance(result.error, Preempted)
            or ("terminate" in done and "told to end" in str(result.error))
            # What freezes while it starts, or is told of others, is found when cluster.start_timeout is over.
            or ("freeze" in done and "cluster.start_timeout" in str(result.error))
        ), result.error
        result = Run(seed, changes, start_from=result).go()
        check(result)
        assert result.error is None, result.error
    assert result.finished
    compare(result, undisturbed(changes))
    return result


def compare(result: Result, plain: Mapping[str, Any]) -> None:
    """The same rows, and the same calibration and weights at every checkpoint."""
    own = result.fingerprint()
    for step, rows in plain["rows"].items():
        assert own["rows"][step] == rows, f"the rows of step {step} differ"
    for step, state in own["states"].items():
        assert state == plain["states"][step], f"calibration or weights after step {step} differ"


def check(result: Result) -> None:
    """What holds of every run, however it ended."""
    made = {actor.name.partition(":")[0] for actor in result.cluster.actors} - {"teacher-sampler"}
    assert made <= result.roles, f"the run asks for {result.roles}, and there was a {made - result.roles}"
    assert not result.cluster.unfinished, f"left behind: {result.cluster.unfinished}"
    assert not any(result.held.values()), f"rollouts are still held: {result.held}"
    if result.finished:
        summary = result.run.summary
        assert summary["generated_tokens"] == (
            summary["kept_tokens"] + summary["overshoot_tokens"] + summary["cut_back_tokens"]
        ), summary
        trained = "learnt_tokens" if result.filters else "kept_tokens"
        assert summary["trained_tokens"] == summary[trained], summary
        assert sorted(result.run.traces) == list(range(summary["steps"]))


def finish(run: Run, *done: str) -> Result:
    """The result of a run to which `done` happened, which must be that of one to which nothing did."""
    result = run.go()
    check(result)
    assert result.error is None, result.error
    assert result.finished
    happened = [line.split(":", 1)[1] for line in result.cluster.log]
    assert set(done) <= set(happened), f"{done} were to happen, {happened} did"
    compare(result, undisturbed(run.changes))
    return result


def main() -> None:
    """Replay a schedule, and print every call."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", choices=sorted(LAYOUTS), default="plain")
    parser.add_argument("--schedule", default="", help="such as 400:kill:scorer:0,500:terminate:driver")
    options = parser.parse_args()
    events = [event.split(":", 2) for event in options.schedule.split(",") if event]
    schedule = [(int(switch), what, whom) for switch, what, whom in events if what != "ray.kill"]
    result = check_schedule(options.seed, schedule, options.layout, print)
    print(*result.notes, result.run.summary, sep="\n")


if __name__ == "__main__":
    main()
