"""DeepSpeed ranks: the student with its loss, one optimiser step, its state saved and restored."""
