"""The acceptance check of a GPU: what this project computes there, against what it computes elsewhere."""
