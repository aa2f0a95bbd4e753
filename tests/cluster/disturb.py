"""Kills the actors of a run while it goes on, from a thread beside it."""

import json
import os
import random
import signal
import threading
import time

import psutil

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
    names = {role: (f"ray::{name}", f"ray::kat:{role}") for role, name in CLASSES.items()}
    return next((role for role, starts in names.items() if title.startswith(starts)), None)


def processes_of(role):
    """The processes below this one that hold actors of a role."""
    return [p for p in psutil.Process().children(recursive=True) if role_of(p) == role]


class Disturber:
    """Ends or freezes one random actor after another once a run has done its first step."""

    def __init__(self, metrics, roles, kills, pauses=(0.3, 2.0), frozen=0.0, seed=0):
        self._metrics, self._roles, self._kills = metrics, roles, kills
        self._pauses, self._frozen = pauses, frozen
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self.killed = []  # (role, signal)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _work(self):
        while not steps_done(self._metrics) and not self._over.wait(0.1):
            pass
        while len(self.killed) < self._kills and not self._over.wait(self._random.uniform(*self._pauses)):
            role = self._random.choice(self._roles)
            number = signal.SIGSTOP if self._random.random() < self._frozen else signal.SIGKILL
            if processes := processes_of(role):
                victim = self._random.choice(processes)
                try:
                    os.kill(victim.pid, number)
                except ProcessLookupError:
                    continue
                self.killed.append((role, number))


def steps_done(metrics):
    """Steps that a run's metrics.jsonl has; 0 while there is none."""
    if not metrics.is_file():
        return 0
    lines = metrics.read_text().splitlines()
    steps = [json.loads(line) for line in lines if line.endswith("}")]
    return max((m["step"] for m in steps if "learner/loss" in m), default=0)


def wait_for_step(metrics, step, process, timeout=240):
    """Until a run in another process has done so many steps."""
    deadline = time.monotonic() + timeout
    while steps_done(metrics) < step:
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline, f"step {step} was not reached in {timeout} s"
        time.sleep(0.05)
