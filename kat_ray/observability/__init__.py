"""What a run shows while it goes on: metric names, progress, timelines, logs, secrets kept out of them."""
