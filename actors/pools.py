"""The actors of a run: made, connected, watched, and brought back when they die."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import ObjectLostError
from ray.util.placement_group import PlacementGroup

from actors.cluster import Placement
from actors.sampler_pool import Engines, LearnersLost, ModelPaths, SamplerPool, new_sampler
from actors.teacher_scorer import TeacherScorer
from actors.trap_monitor import TrapMonitor
from actors.watch import LOST, StopRequest, get, remote_class, slices, started
from kat_ray.config import Config
from kat_ray.termination import RunFacts
from kat_ray.types import SamplingOrder

log = logging.getLogger("kat_ray.pools")


def shard_of(sampler: int, shards: int) -> int:
    """The monitor that all rollouts of the `sampler`-th sampler belong to."""
    return sampler % shards


class Pools(SamplerPool):
    """All actors of a run."""

    def __init__(
        self,
        config: Config,
        paths: ModelPaths,
        placement: Placement,
        stop: StopRequest,
        engines: Engines | None = None,
    ) -> None:
        super().__init__(config, paths, placement, stop, engines)
        self._connected = False
        facts = RunFacts(config.run.seed, config.rollout.max_tokens)
        self.monitors = [
            self._make("monitor", i, TrapMonitor, config.termination, facts) for i in range(config.monitor.shards)
        ]
        self.learners = [self._learner(i) for i in range(config.learner.world_size)]
        self.scorers = [self._new_scorer(i, placement.options("scorer", i)) for i in range(config.scorer.replicas)]
        self._starting: list[Any] = []
        self._retired: list[tuple[Any, PlacementGroup]] = []  # whose last records are still to be learnt

    def start(self) -> None:
        """Begin to load the models of scorers and learners; `join` waits for them."""
        self.remember({f"learner:{rank}": learner for rank, learner in enumerate(self.learners)})
        self._starting = self._start_learners()
        for scorer in self.scorers:
            scorer.ready.remote()

    def join(self) -> None:
        """Wait until every model is loaded, and connect samplers, scorers and monitor."""
        self.started([s.ready.remote for s in self.scorers], "scorers to load", interruptible=True)
        try:
            self.wait_learners(self._starting, "the learner to start", interruptible=True, limit="start_timeout")
        except LearnersLost as error:
            self.restart_learners(error)
        self.connect()
        self.remember(self.named())

    def connect(self) -> None:
        """Tell every sampler of its scorers and its monitor."""
        self._connected = True
        check = partial(self._stop.check, interruptible=False)
        connect(self.samplers, self.scorers, self.monitors, self.limits.start_timeout, check)

    def introduce(self, index: int) -> list[Any]:
        """Tell a new sampler of its scorers and its monitor."""
        if not self._connected:
            return []
        monitor = self.monitors[shard_of(index, len(self.monitors))]
        return [self.samplers[index].connect.remote(self.scorers, monitor, index, len(self.samplers))]

    def named(self) -> dict[str, Any]:
        """All actors by name."""
        roles = {
            "sampler": self.samplers,
            "scorer": self.scorers,
            "monitor": self.monitors,
            "learner": self.learners,
        }
        return {f"{role}:{i}": actor for role, actors in roles.items() for i, actor in enumerate(actors)}

    def wait_learners(
        self, refs: Sequence[Any], what: str, interruptible: bool = False, limit: str = "step_timeout"
    ) -> list[Any]:
        """Results of learner ranks, within `cluster.<limit>`; `LearnersLost` if one of them died.

        A lost record is no lost learner, and passes through.
        """
        left = list(refs)
        try:
            for seconds in slices(getattr(self.limits, limit), what, limit):
                # One that died says so at once; the others may wait for it in a collective for ever.
                done, left = ray.wait(left, num_returns=1, timeout=seconds)
                get(done, what)
                if not left:
                    return get(refs, what)
                self.tick(interruptible)
        except ObjectLostError:
            raise
        except LOST as error:
            raise LearnersLost(str(error).splitlines()[-1]) from error
        raise AssertionError

    def publish(self, version: int) -> None:
        """Give every sampler the learner's weights under this version."""
        pairs = [rank.weights.options(num_returns=2).remote(version) for rank in self.learners]
        self.wait_learners([done for _, done in pairs], "the learner's weights")
        self.version, self._update = version, pairs[0][0]
        try:
            loaded = self.on_samplers(lambda _, s: s.load_weights.remote(self._update), "weights to be published")
        except ObjectLostError as error:
            raise LearnersLost("the weights were lost with the node that held them") from error
        assert all(v == version for v in loaded), f"samplers hold versions {loaded}, published was {version}"

    def abandon(self, order: SamplingOrder) -> None:
        """Have the scorers forget an order whose sampler was lost, before its rollouts are ordered again."""
        ids = [s.rollout_id for s in order.specs]
        refs = [s.abandon.remote(order.attempt, ids) for s in self.scorers]
        ray.wait(
            refs, num_returns=len(refs), timeout=self.limits.hang_timeout
        )  # a lost scorer has forgotten it too

    def revive_monitor(self, index: int) -> None:
        """Wait until a lost monitor is back; it is told of its rollouts by those that have them."""
        self._watch.until_new(f"monitor:{index}", self.monitors[index])

    def restart_learners(self, error: LearnersLost) -> None:
        """End all ranks, and have a new group meet; it holds the student as it was given.

        The weights last published may be gone with the old one: who comes back is given none until the next are.
        """
        self.note_loss("learner", 0, error)
        self.version, self._update = 0, None
        for rank, learner in enumerate(self.learners):
            self._watch.until_new(f"learner:{rank}", learner)
        try:
            self.wait_learners(self._start_learners(), "the learner to start again", limit="start_timeout")
        except LearnersLost as again:
            self.restart_learners(again)

    def _start_learners(self) -> list[Any]:
        ((host, port),) = self.started([self.learners[0].address.remote], "learner 0 to start")
        return [learner.start.remote(host, port) for learner in self.learners]

    def abandon_sampling(self) -> None:
        """End whatever the samplers are at, by ending them; they come back with the weights of `version`."""
        for sampler in tuple(self.samplers):
            ray.kill(sampler, no_restart=False)
        for sampler in tuple(self.samplers):
            self.revive_or_drop(sampler)

    # --- pools that change -------------------------------------------------------------------------------------

    def replicas(self, role: str) -> list[Any]:
        """The actors of a pool."""
        return {"sampler": self.samplers, "scorer": self.scorers}[role]

    def make_spare(self, role: str, group: PlacementGroup) -> Any:
        """One more replica, in a place of its own; it loads its model and is not used yet."""
        number, options = self.placement.spare_options(role, group)
        if role == "scorer":
            return self._new_scorer(number, options)
        return new_sampler(
            self._config, self._paths, self._config.student, self._paths.student_dir, f"sampler:{number}",
            self._engines.sampler, options,
        )  # fmt: skip

    def brief(self, role: str, actor: Any) -> int:
        """Give a replica that stands what it must know; returns its process id. Waits `cluster.hang_timeout`."""
        pending = [actor.health.remote()]
        if role == "sampler" and self._update is not None:
            pending.append(actor.load_weights.remote(self._update))
        beat, *_ = self.wait(pending, f"a new {role} to take its weights", limit="hang_timeout")
        return int(beat.pid)

    def join_pool(self, role: str, actor: Any, group: PlacementGroup, pid: int) -> None:
        """Use a replica that was briefed. No sampler may be at work."""
        replicas = self.replicas(role)
        self.placement.take(role, group)
        replicas.append(actor)
        self._watch.pids[f"{role}:{len(replicas) - 1}"] = pid
        self.connect()

    def retire(self, role: str) -> None:
        """Use the last replica no more; it lives until `end_retired`, since its records may be needed."""
        replicas = self.replicas(role)
        actor, index = replicas.pop(), len(replicas)
        self._watch.give_up(role, index, actor)
        self._retired.append((actor, self.placement.detach(role, index)))
        self.connect()

    def end_retired(self) -> None:
        """End the replicas that were retired before, and give their places back."""
        for actor, group in self._retired:
            ray.kill(actor)
            self.placement.forget(group)
        self._retired.clear()

    def spare_lost(self, role: str) -> list[int]:
        """Replicas gone for longer than `cluster.replacement_timeout`, as far as the pool can do without them."""
        fewest, _ = (self._config.sampler if role == "sampler" else self._config.scorer).bounds
        count = len(self.replicas(role))
        gone = [i for i in range(count) if self._watch.down(f"{role}:{i}") > self.limits.replacement_timeout]
        return gone[: max(0, count - fewest)]

    def drop(self, role: str, indices: Sequence[int]) -> None:
        """Do without replicas that are lost. No sampler may be at work."""
        replicas = self.replicas(role)
        for index in sorted(indices, reverse=True):
            log.warning("%s:%d finds no place any more: it is done without", role, index)
            actor = replicas.pop(index)
            self._watch.give_up(role, index, actor)
            ray.kill(actor)
            self.placement.forget(self.placement.detach(role, index))
        if indices:
            self.connect()

    def _new_scorer(self, number: int, options: dict[str, Any]) -> Any:
        paths = self._paths
        return (
            remote_class(TeacherScorer)
            .options(**options)
            .remote(
                f"scorer:{number}", self._config, paths.teacher_dir, paths.stop_ids, paths.max_model_len,
                self._engines.scorer,
            )
        )  # fmt: skip

    def _learner(self, rank: int) -> Any:
        config, paths = self._config, self._paths
        return self._make(
            "learner", rank, self._engines.learner, rank, config.learner.world_size, config, paths.student_dir,
            paths.stop_ids,
        )  # fmt: skip

    def _make(self, role: str, index: int, cls: Callable[..., Any], *args: Any) -> Any:
        return remote_class(cls).options(**self.placement.options(role, index)).remote(*args)


def connect(
    samplers: Sequence[Any],
    scorers: Sequence[Any],
    monitors: Sequence[Any],
    timeout: float,
    check: Callable[[], object] = lambda: None,
) -> None:
    """Give every sampler the scorers and the monitor that its chunks go to."""
    n = len(samplers)
    calls = [
        partial(s.connect.remote, scorers, monitors[shard_of(i, len(monitors))], i, n)
        for i, s in enumerate(samplers)
    ]
    started(calls, timeout, "samplers to be connected (cluster.start_timeout)", check)
