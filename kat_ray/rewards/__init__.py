"""Graded answers: verifiers by name, reward functions of users, avg@k and pass@k."""
