"""Prompts and their order; rollouts as chunks, token accounting, samples and micro-batches."""
