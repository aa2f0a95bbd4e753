"""Prompts, the order they are drawn in, and the batches made of rollouts: chunks, rows, token accounting."""
