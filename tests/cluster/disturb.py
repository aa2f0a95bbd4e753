"""Kills the actors of a run while it goes on, from a thread beside it, and looks at how far the run has come."""

import json
import os
import random
import signal
import threading
import time

import psutil
import ray

CLASSES = {"sampler": "StudentSampler", "scorer": "TeacherScorer", "monitor": "TrapMonitor", "learner": "Learner"}


def title_of(process):
    """What a process calls itself; empty of one that has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def role_of(process):
    """The role whose actor a process holds, None if it holds none: its title begins with it."""
    title = title_of(process)
    names = {role: (f"ray::{name}", f"ray::Stub{name}", f"ray::kat:{role}") for role, name in CLASSES.items()}
    return next((role for role, starts in names.items() if title.startswith(starts)), None)


def processes_of(role):
    """The processes below this one that hold actors of a role."""
    return [p for p in psutil.Process().children(recursive=True) if role_of(p) == role]


def newest_of(role):
    """The one that was started last: one that is about to end may still be there."""
    return max(processes_of(role), key=lambda p: p.create_time())


def named(name):
    """What Ray knows of the actors of a name; a run's are listed for a while after it has ended."""
    return [actor for actor in ray.util.list_named_actors(True) if actor["name"] == name]


def kill_named(name, ended=()):
    """The process of the actor of a name which is not among `ended`."""
    (found,) = [actor for actor in named(name) if actor not in ended]
    pid = ray.get(ray.get_actor(**found).__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGKILL)


def is_frozen(process):
    """Whether it has been stopped by a signal; also true of one that has ended."""
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return True


class Beside:
    """A thread that works beside a run, from the beginning of a `with` to its end."""

    def __init__(self):
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _work(self):
        raise NotImplementedError


class Disturber(Beside):
    """Ends or freezes one actor after another once a run has done its first step, and then calls `then`.

    The first victims are one of each role, the others random, and at most `per_step` to a step: on a slow machine
    all would fall into one. Of `freeze_every` victims the first is frozen, and left to whoever notices that.
    """

    def __init__(
        self, metrics, roles, kills, pauses=(0.3, 2.0), per_step=4, freeze_every=None, seed=0, then=lambda: None
    ):
        super().__init__()
        self._metrics, self._roles, self._kills = metrics, roles, kills
        self._pauses, self._per_step, self._freeze_every, self._then = pauses, per_step, freeze_every, then
        self._random = random.Random(seed)
        self.killed = []  # (role, signal)

    def _work(self):
        first, furthest = list(dict.fromkeys(self._roles)), 0
        while len(self.killed) < self._kills and not self._over.wait(self._random.uniform(*self._pauses)):
            number = len(self.killed)
            furthest = max(furthest, steps_done(self._metrics))
            if number < self._per_step * furthest:
                role = first[number] if number < len(first) else self._random.choice(self._roles)
                freeze = self._freeze_every is not None and number % self._freeze_every == 0
                self._hit(role, signal.SIGSTOP if freeze else signal.SIGKILL)
        if len(self.killed) == self._kills:
            self._then()

    def _hit(self, role, number):
        """One process of a role; none if all of them are frozen or being started."""
        victims = [p for p in processes_of(role) if not is_frozen(p)]
        if number == signal.SIGSTOP:  # one that starts may take `cluster.start_timeout`, which is long
            victims = [p for p in victims if p.create_time() < self._metrics.stat().st_mtime]
        if not victims:
            return
        try:
            os.kill(self._random.choice(victims).pid, number)
        except ProcessLookupError:
            return
        self.killed.append((role, number))


class AtSteps(Beside):
    """Does one thing after another, each once a run has done so many steps."""

    def __init__(self, metrics, *acts):
        super().__init__()
        self._metrics, self._acts = metrics, acts  # (steps, what to call)
        self.done = []  # steps that the run had done when each was through

    def _work(self):
        for steps, act in self._acts:
            while steps_done(self._metrics) < steps:
                if self._over.wait(0.02):
                    return
            act()
            self.done.append(steps_done(self._metrics))


def lines_of(metrics):
    """What a run's metrics.jsonl holds, without a last line that is half written; nothing while there is none."""
    if not metrics.is_file():
        return []
    *whole, _ = metrics.read_text().split("\n")
    return [json.loads(line) for line in whole]


def steps_done(metrics):
    """Steps that a run's metrics.jsonl has; 0 while there is none."""
    return max((m["step"] for m in lines_of(metrics) if "learner/loss" in m), default=0)


def wait_for_step(metrics, step, process, timeout=300):
    """Until a run in another process has done so many steps."""
    deadline = time.monotonic() + timeout
    while steps_done(metrics) < step:
        assert process.poll() is None, f"the run ended early: {process.communicate()}"
        assert time.monotonic() < deadline, f"step {step} was not reached in {timeout} s"
        time.sleep(0.05)
