"""A run in a bucket without a cluster: what its driver and two learner ranks write, and how it goes on.

`python -m tests.support.stored_runs ADDRESS LOCAL STEPS [resume]` is one as a process, which a test can kill.
"""

import json
import sys

from kat_ray.config import RunConfig
from kat_ray.config.load import config_yaml, load_config
from kat_ray.run.checkpoint import FileDigest
from kat_ray.run.checkpoint_parts import CheckpointParts
from kat_ray.run.directory import EVALUATIONS, METRICS
from kat_ray.run.stored_run import open_run
from kat_ray.storage.address import Address

STEPS, EVERY, RANKS = 6, 2, 2  # three checkpoints, of which two are kept


def run_settings(address, local, timeout, steps=STEPS):
    """Of the run at an address, on a driver's node whose folder is `local`."""
    return RunConfig(
        dir=str(address.parent), name=address.name, steps=steps, keep_checkpoints=2, keep_best=False,
        store_timeout=timeout, local_dir=str(local),
    )  # fmt: skip


def yaml_of(settings):
    """Its configuration."""
    return config_yaml(load_config("demo", [f"run.dir={settings.dir}", f"run.name={settings.name}"]))


def node(settings, rank):
    """Each rank has a node of its own, and so has the driver."""
    return CheckpointParts(f"{settings.local_dir}-{rank}", settings.store_timeout)


def content(step, rank):
    return f"step {step} of rank {rank}".encode()


def record(run, step):
    """A step's records, as the driver writes them."""
    for name in (METRICS, EVALUATIONS):
        with (run.path / name).open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")
    (run.path / "traces" / f"step-{step - 1:08d}.parquet").write_text(f"trace of step {step}")


def save(run, settings, step):
    """A checkpoint: each rank writes and uploads its part from its own node, then the driver commits."""
    state = {"done": step, "positions": run.positions()}
    place, digests = run.checkpoints.begin(step), {}
    for rank in range(RANKS):
        folder, upload = node(settings, rank).for_writing(str(place), rank)
        names = [f"training/learner-{rank}-of-{RANKS}.safetensors", *(["config.json"] if rank == 0 else [])]
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content(step, rank))
        own = {name: FileDigest.of(folder / name) for name in names}
        upload(own)
        digests |= own
        assert not folder.exists(), "what is uploaded is not kept on the node"
    return run.checkpoints.commit(step, state, digests, None)


def newest(run, settings):
    """The newest checkpoint, read by the ranks as a resume reads it."""

    def damage(path, files):
        return node(settings, 0).find_damage(str(path), files, lambda: None)

    return run.checkpoints.newest(damage)


def go(run, settings, resume):
    """The steps of a run, from its newest checkpoint where it has one."""
    loaded = None if resume is None else newest(run, settings)[0]
    done = loaded.step if loaded else 0
    for rank in range(RANKS if loaded else 0):
        folder = node(settings, rank).for_reading(str(loaded.path), lambda: None)
        assert (folder / f"training/learner-{rank}-of-{RANKS}.safetensors").read_bytes() == content(done, rank)
    run.begin()
    run.rewind(done, loaded.state["positions"] if loaded else {})
    for step in range(done + 1, settings.steps + 1):
        record(run, step)
        if step % EVERY == 0:
            save(run, settings, step)
    run.write_summary({"steps": settings.steps})


def train(settings, resume=None):
    """A whole process: a new run, or one that goes on."""
    with open_run(settings, resume, yaml_of(settings)) as run:
        go(run, settings, resume)
    return run


if __name__ == "__main__":
    address, local, steps, *resume = sys.argv[1:]
    place = Address.of(address)
    train(run_settings(place, local, 60.0, int(steps)), place if resume else None)
