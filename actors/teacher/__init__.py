"""The teacher scorer and its backends: each token through the teacher once."""
