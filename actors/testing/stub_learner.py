"""A learner without a model, torch or DeepSpeed: its weights are a sum over the tokens that it was given to learn.

It stands where the learner stands: placed, fed, asked for weights, saved and restored by the same calls. The sum is
of integers and depends on the order of the steps, not on that of the rows within one. So two runs have the same
weights, to the bit, where they have learnt the same tokens in the same steps, each of them once.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kat_ray.cluster.heartbeat import Heartbeat, HeartbeatReport
from kat_ray.data.batch import TrainingSample, collect_samples
from kat_ray.data.given import GivenShare, given_samples
from kat_ray.errors import StateLost
from kat_ray.observability.logs import label_logs
from kat_ray.observability.timeline import Span, Timeline
from kat_ray.run.checkpoint import TRAINING, FileDigest
from kat_ray.run.step_result import LearnerReport
from kat_ray.types.records import KeptRollout, WeightUpdate

if TYPE_CHECKING:
    from actors.learner.settings import LearnerSettings

log = logging.getLogger("kat_ray.learner")

MODEL, STATE = "model.safetensors", f"{TRAINING}/learner-0-of-1.safetensors"
_SIZE = 64  # numbers in the "model"
_STEP = np.uint64(0x5851F42D4C957F2D)  # odd: a step multiplies what was there before it, and loses nothing of it


class StubLearner:
    """The one rank of a learner."""

    def __init__(self, rank: int, settings: LearnerSettings) -> None:
        ranks = settings.learner.world_size
        assert ranks == 1, f"learner.world_size = {ranks}: stubs of several ranks would have to meet"
        label_logs()
        self._lr, self._top_k = settings.learner.lr, settings.top_k
        self._parts = settings.parts
        self._weights: NDArray[np.uint64] | None = None  # [_SIZE], once it is started
        self._steps = 0
        self._rows: list[TrainingSample] | None = None
        self._logprobs: dict[int, NDArray[np.float32]] = {}
        self._timeline = Timeline()
        self._heartbeat = Heartbeat()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[dict[str, FileDigest]] | None = None

    def spans(self) -> tuple[Span, ...]:
        """What was done since this was last asked."""
        return self._timeline.drain()

    def health(self) -> HeartbeatReport:
        """What it is at."""
        return self._heartbeat.read()

    def address(self) -> tuple[str, int]:
        """Nobody is met there."""
        return "127.0.0.1", 0

    def start(self, host: str, port: int) -> dict[str, Any]:
        """Have weights of zero."""
        self._weights = np.zeros(_SIZE, np.uint64)
        log.info("stub of rank 0 is ready")
        return {"rank": 0, "seconds": 0.0}

    def collect(
        self,
        chunks: Sequence[Any],
        teacher: Sequence[Any],
        kept: Sequence[KeptRollout],
        given: GivenShare | None = None,
    ) -> None:
        """Fetch a batch. Raises Ray's ObjectLostError if records are lost."""
        self._started()
        with self._timeline.span("collect"), self._heartbeat.busy("collect"):
            self._rows = _fetched(chunks, teacher, kept)
            if given is not None:
                self._rows += _fetched_given(given, self._top_k)

    def learn(self, global_weight: float, policy_version: int) -> LearnerReport:
        """Add what was collected. `StateLost` if nothing was."""
        if self._rows is None:
            raise StateLost("learner 0 holds no batch: its process is new")
        started = time.monotonic()
        rows, self._rows = self._rows, None
        with self._timeline.span("learn"), self._heartbeat.busy("learn"):
            added, loss, tokens = _learnt(rows)
            self._logprobs = {row.rollout_id: row.sampled_logprobs for row in rows}
            self._weights = self._started() * _STEP + added
            self._steps += 1
        return LearnerReport(
            policy_version=policy_version, loss=loss / max(global_weight, 1e-9), grad_norm=1.0,
            lr=self._lr, tokens=tokens, dropped_tokens=0, logprob_diff_mean=0.0,
            logprob_diff_max=0.0, entropy=1.0, tail_mass=0.1 if self._top_k else None,
            stop_mass=0.01, micro_batches=len(rows),
            seconds=time.monotonic() - started, skipped=False,
        )  # fmt: skip

    def step_logprobs(self) -> dict[int, NDArray[np.float32]]:
        """The sampler's own: the two are one model."""
        return self._logprobs

    def weights(self, policy_version: int) -> tuple[WeightUpdate, int]:
        """All there is, and its version."""
        return WeightUpdate(policy_version, ("sum",), ("uint64",), (self._started().copy(),)), policy_version

    def snapshot(self, path: str, tokenizer_dir: str) -> None:
        """Have a thread write the weights of this moment below the directory `path`."""
        model = {"sum": self._started().copy()}
        state = model | {"steps": np.array([self._steps])}
        folder, upload = self._parts.for_writing(path, 0)
        self._writing = self._thread.submit(_write, folder, {MODEL: model, STATE: state}, upload)

    def written(self) -> dict[str, FileDigest]:
        """Wait until the files of the last snapshot are on disk; their digests by relative path."""
        self._started()
        assert self._writing is not None, "no snapshot is being written"
        writing, self._writing = self._writing, None
        with self._heartbeat.busy("write the checkpoint"):
            return writing.result()

    def find_damage(self, path: str, files: Mapping[str, FileDigest]) -> str | None:
        """As a real rank does."""
        return self._parts.find_damage(path, files, self._heartbeat.beat)

    def restore(self, path: str) -> None:
        """Go on from a checkpoint."""
        from safetensors.numpy import load_file

        self._started()
        state = load_file(self._parts.for_reading(path, self._heartbeat.beat) / STATE)
        self._weights, self._steps = state["sum"], int(state["steps"][0])

    def _started(self) -> NDArray[np.uint64]:
        if self._weights is None:
            raise StateLost("learner 0 was not started: its process is new")
        return self._weights


def _fetched(chunks: Sequence[Any], teacher: Sequence[Any], kept: Sequence[KeptRollout]) -> list[TrainingSample]:
    import ray

    return collect_samples(ray.get(list(chunks)), ray.get(list(teacher)), kept)


def _fetched_given(given: GivenShare, top_k: int) -> list[TrainingSample]:
    import ray

    return given_samples(given, ray.get(list(given.chunks)), ray.get(list(given.teacher)), top_k)


def _write(
    path: Path,
    files: dict[str, dict[str, NDArray[Any]]],
    on_written: Callable[[Mapping[str, FileDigest]], object],
) -> dict[str, FileDigest]:
    from safetensors.numpy import save_file

    for name, tensors in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        save_file(tensors, path / name)
    digests = {name: FileDigest.synced(path / name) for name in files}
    on_written(digests)
    return digests


def _learnt(rows: Sequence[TrainingSample]) -> tuple[NDArray[np.uint64], float, int]:
    """What a batch adds to the weights; the sum of its tokens' differences to the teacher, and their number."""
    added = np.zeros(_SIZE, np.uint64)
    loss, tokens = 0.0, 0
    for row in rows:
        weights, difference = row.weights.astype(np.float32), row.sampled_logprobs
        if row.teacher_topk.shape[1]:
            difference = difference - row.teacher_topk[:, 0].astype(np.float32)
        elif row.policy is not None:  # without a teacher all that is learnt is the policy's
            weights = np.full(len(row.token_ids), row.policy.weight, np.float32)
        position = np.arange(len(row.token_ids), dtype=np.uint64)
        weighed = weights.view(np.uint32).astype(np.uint64)
        mixed = _mix((np.uint64(row.rollout_id) << np.uint64(32)) + position) ^ _mix(weighed)
        np.add.at(added, row.token_ids % _SIZE, mixed)
        here = (weights > 0) & (row.given is None)  # the figures are of what was generated
        loss += float((difference * weights)[here].sum())
        tokens += int(here.sum())
    assert math.isfinite(loss), "the stub teacher says something of every token"
    return added, loss, tokens


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread integers over all of uint64 (splitmix64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
