"""Records that cross actor boundaries, and token ids packed for the journey. No torch, no I/O."""
