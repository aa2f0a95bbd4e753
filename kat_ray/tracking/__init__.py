"""A run's metrics shown by other people's trackers: wandb, MLflow, trackio, SwanLab (docs/tracking.md).

Each tracker is a process of its own (`follow`), which reads the run's records and tells its package; the driver
only says when there is something to read (`tracker`). What a package does, prints, hangs in or dies of stays there.
"""
