"""Engines and models that compute nothing real, for tests and for benchmarks of everything around them."""
