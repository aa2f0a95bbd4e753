"""The teacher scorer and its backends: each token is run through the teacher once."""
