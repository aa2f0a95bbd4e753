"""`python -m kat_ray.cli`: what jobs on a cluster start, by whatever `python` the head has."""

import sys

from kat_ray.cli.interpreter import too_old

if __name__ == "__main__":
    if said := too_old():  # before anything that an older Python cannot read is imported
        sys.exit(f"error: {said}")
    from kat_ray.cli.main import main

    sys.exit(main())
