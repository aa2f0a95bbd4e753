"""Prompts and their order, and what rollouts become: chunks, token accounting, samples, micro-batches."""
