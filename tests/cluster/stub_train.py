"""The command line with stub engines: `python -m tests.cluster.stub_train train ...`.

Runs are slow until a file lies in their folder (`paced`), so that they can be ended half-way.
"""

import sys

from actors.driver import train as run
from kat_ray.cli import main as cli
from tests.cluster.paced import paced

RATE = 1500.0  # half a second a step of 16 rollouts of 48 tokens


def main() -> int:
    """What the command line returns."""
    real = run.train
    run.train = lambda config, resume=None: real(config, resume, paced(config, RATE))
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
