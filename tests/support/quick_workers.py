"""Rays whose workers start without importing Ray twice: `setup_worker.py` beside this file in place of Ray's own.

`python -m tests.support.quick_workers start ...` is `ray start ...` with it.
"""

from pathlib import Path

from ray._private import ray_constants


def quick_workers():
    """Of all Rays that this process starts from now on; there is no option for it."""
    ray_constants.SETUP_WORKER_FILENAME = str(Path(__file__).with_name("setup_worker.py"))


if __name__ == "__main__":
    from ray.scripts.scripts import main

    quick_workers()
    main()
