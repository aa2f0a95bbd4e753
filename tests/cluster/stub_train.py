"""The command line with stub engines: `python -m tests.cluster.stub_train train ...`.

Runs are slow until a file lies in their folder (`paced`), so that they can be ended half-way.
"""

import sys
from collections.abc import Sequence
from unittest import mock

from actors.driver import train as run
from actors.driver.train import train
from kat_ray.cli import main as cli
from tests.cluster.paced import paced
from tests.support.quick_workers import quick_workers

RATE = 1500.0  # half a second a step of 16 rollouts of 48 tokens


def main(argv: Sequence[str] | None = None) -> int:
    """What the command line returns."""
    quick_workers()
    with mock.patch.object(run, "train", lambda config, resume=None: train(config, resume, paced(config, RATE))):
        return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main())
