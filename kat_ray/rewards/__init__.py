"""Graded answers: verifiers by name, avg@k and pass@k."""
