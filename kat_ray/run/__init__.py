"""One run on disk and through time: its directory, checkpoints, resumption, totals, and the guards that end it."""
