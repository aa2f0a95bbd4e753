"""A run tells those trackers of its figures that its configuration names."""

import io
from types import SimpleNamespace

from actors.driver.training_run import _trackers
from kat_ray.config.load import load_config
from kat_ray.observability.progress import Progress


def named(folder, *overrides):
    config = load_config("demo", overrides)
    found = _trackers(config, SimpleNamespace(path=folder), Progress(9, io.StringIO()))
    return [tracker.name or type(tracker).__name__ for tracker in found._trackers]


def test_those_that_are_named(tmp_path):
    rest = ["RayMetrics", "ConsoleTracker"]
    assert named(tmp_path) == ["JsonlTracker", "TensorBoardTracker", *rest]
    assert named(tmp_path, "run.tensorboard=false") == ["JsonlTracker", *rest]
    both = named(tmp_path, "tracking=[wandb, mlflow]")
    assert both == ["JsonlTracker", "tracking: wandb", "tracking: mlflow", *rest], "after what they read"
