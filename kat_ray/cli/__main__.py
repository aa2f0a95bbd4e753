"""`python -m kat_ray.cli`: what jobs on a cluster start."""

import sys

from kat_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
