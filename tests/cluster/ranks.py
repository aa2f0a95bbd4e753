"""Ranks of a learner without Ray: processes that a server forks, which has imported all that they need.

A Ray actor imports torch, DeepSpeed and transformers first, which takes two of them eight seconds on two cores, and
then does what a rank does here: each is a new process. Whole runs have them as actors.
"""

import multiprocessing
import threading
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import torch

from actors.learner.learner import Learner
from actors.learner.optimizer_state import held_pieces
from actors.learner.settings import LearnerSettings
from kat_ray.data.batch import assign_ranks, collect_samples
from kat_ray.data.given import given_samples
from kat_ray.losses.divergence import tail_and_stop
from kat_ray.types.records import KeptRollout, TeacherRows
from tests.support.chunks import chunk_of, random_rollouts
from tests.support.configs import make_config

SECONDS = 120  # that a call may take
PRELOADED = [
    "ray", "deepspeed.runtime.zero.muon.muon_optimizer", "transformers.models.qwen3.modeling_qwen3",
    "actors.learner.learner", "peft.tuners.lora", "tests.cluster.ranks",
]  # fmt: skip


class Opened(Learner):
    """A learner that shows what DeepSpeed holds."""

    def full_state(self):
        """Weights and moments, by DeepSpeed's own gathering functions."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state = {}
        for name, parameter in self._loaded.student.trained_parameters():
            state[f"master/{name}"] = safe_get_full_fp32_param(parameter).flatten().numpy().copy()
            for kind in ("exp_avg", "exp_avg_sq"):
                state[f"{kind}/{name}"] = safe_get_full_optimizer_state(parameter, kind).flatten().numpy().copy()
        return state

    def state(self):
        """The optimiser's own copies of the weights, moments and step counts, as bytes."""
        optimizer = self._loaded.engine.basic_optimizer
        masters = [p for group in optimizer.param_groups for p in group["params"]]
        moments = [v for p, state in optimizer.state.items() for v in (p, *state.values())]
        return [v.detach().float().numpy().tobytes() for v in (*masters, *moments) if isinstance(v, torch.Tensor)]

    def gradients(self, *step):
        """What AdamW is given of this rank's share in a step: (parameter, first element, float32 values) each."""
        loaded, given = self._loaded, {}

        def keep(optimizer, *_):
            given.update(
                (id(p), p.grad.clone()) for g in optimizer.param_groups for p in g["params"] if p.grad is not None
            )

        handle = loaded.engine.basic_optimizer.register_step_pre_hook(keep)
        self.train_step(*step)
        handle.remove()
        pieces = held_pieces(loaded.engine, loaded.student, self._rank, self._settings.learner.world_size)
        return [(p.name, p.start, p.of(given[id(p.flat)]).numpy()) for p in pieces]

    def given_step(self, chunks, teacher, kept, share, weight):
        """A step with completions beside what was generated, from records instead of references to them."""
        given = given_samples(share, share.chunks, share.teacher, chunks[0].topk_ids().shape[1])
        self._take([*collect_samples(chunks, teacher, kept), *given])
        return self.learn(weight, 0)

    def hold(self):
        """Nothing is written until `release`."""
        self.released = threading.Event()
        self._loaded.snapshots._thread.submit(self.released.wait)

    def release(self):
        self.released.set()

    def copies(self):
        """How often this rank's host holds the weights as they were before `change_weights`."""
        whole = sum(getattr(p, "ds_numel", p.numel()) for _, p in self._loaded.student.trained_parameters())
        return sum(tensor.numel() for tensor in self._saved) / whole

    def random(self):
        return torch.rand(3).tolist()


@cache
def _forks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _serve(pipe, args):
    learner = Opened(*args)
    while True:
        method, given = pipe.recv()
        try:
            answer = getattr(learner, method)(*given), None
        except Exception as error:  # whatever it is, the test that called raises it (`Rank.answer`)
            answer = None, error
        pipe.send(answer)


class Rank:
    """One rank in a process of its own."""

    def __init__(self, *args):
        self._pipe, theirs = _forks().Pipe()
        self._process = _forks().Process(target=_serve, args=(theirs, args), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, method, *args):
        self._pipe.send((method, args))

    def answer(self):
        """Of the oldest call that was sent; what it raised is raised here."""
        assert self._pipe.poll(SECONDS), f"a rank did not answer in {SECONDS} s"
        result, error = self._pipe.recv()
        if error is not None:
            raise error
        return result

    def call(self, method, *args):
        self.send(method, *args)
        return self.answer()

    def kill(self):
        self._process.kill()
        self._process.join()


class Group:
    """All ranks of a learner."""

    def __init__(self, models, world_size, *, stop_ids=(1,), objective=None, told=None, **learner):
        """`told`: other values of `LearnerSettings`."""
        given = {"world_size": world_size, "lr": 1e-3, "micro_batch_tokens": 64, "logits_chunk_tokens": 16}
        rewarded = {
            "objective": objective,
            "rollout": {"rollouts_per_prompt": 7, "top_p": 1.0},
            "data": {"answer_column": "a"},
        }
        self.config = make_config(
            models["student"][0], models["teacher"][0], learner=given | learner, run={"steps": 10},
            **(rewarded if objective else {}),
        )  # fmt: skip
        settings = LearnerSettings.from_config(self.config, models["student"][0], stop_ids)
        settings = replace(settings, **(told or {}))
        self.ranks = [Rank(r, settings) for r in range(world_size)]
        try:
            self.all("start", *self.ranks[0].call("address"))
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def all(self, method, *args):
        """Call a method of all ranks at once; their answers."""
        return self.each(method, [args] * len(self.ranks))

    def each(self, method, args):
        """Call a method of all ranks at once, each with arguments of its own; their answers."""
        for rank, given in zip(self.ranks, args, strict=True):
            rank.send(method, *given)
        return [rank.answer() for rank in self.ranks]

    def train(self, step, weight=None):
        """All ranks' reports of one step; `weight` stands in for the sum of the kept tokens' weights."""
        chunk, teacher, kept = step
        weight = sum(k.weight for k in kept) if weight is None else weight
        shares = assign_ranks(kept, len(self.ranks))
        assert all(shares), "a rank without work"
        return self.each("train_step", [([chunk], [teacher], share, weight, 0) for share in shares])

    def step(self, chunk, teacher, kept):
        """Rank 0's report of one step."""
        return self.train((chunk, teacher, kept))[0]

    def steps(self, models, numbers):
        """Reports of one step for each seed, without what is measured by the clock."""
        reports = [asdict(self.step(*step_of(models, random_rollouts(7, seed=s)))) for s in numbers]
        for report in reports:
            del report["seconds"]
        return reports

    def weights(self):
        update, _ = self.all("weights", 1)[0]
        return dict(zip(update.names, update.arrays, strict=True))

    def everything(self):
        """Of all ranks, what a step could move: bytes."""
        return self.all("state"), {name: array.tobytes() for name, array in self.weights().items()}

    def snapshot(self, path, tokenizer_dir):
        path.mkdir()
        self.all("snapshot", str(path), tokenizer_dir)

    def written(self):
        digests = self.all("written")
        assert sum(map(len, digests)) == len({name for d in digests for name in d}), "each file by one rank"
        return {name: digest for d in digests for name, digest in d.items()}

    def save(self, path, tokenizer_dir):
        self.snapshot(path, tokenizer_dir)
        return self.written()

    def restore(self, path):
        self.all("restore", str(path))

    def close(self):
        for rank in self.ranks:
            rank.kill()


@torch.no_grad()
def step_of(models, rollouts):
    """Chunk, teacher rows and work list of one step, from the real models."""
    chunk = chunk_of(models["student"][1], rollouts)
    logits = [
        models["teacher"][1](torch.tensor([[*p, *t]])).logits[0, len(p) - 1 : -1] for p, t in rollouts.values()
    ]
    q = torch.log_softmax(torch.cat(logits), -1)
    ids = torch.from_numpy(chunk.topk_ids().astype(np.int64))
    tail, stop = tail_and_stop(q, ids, (1,))
    teacher = TeacherRows(q.gather(-1, ids).numpy(), tail.numpy(), stop.numpy())
    kept = [KeptRollout(i, len(p), max(1, len(t) - i % 3)) for i, (p, t) in rollouts.items()]
    return chunk, teacher, kept
