"""Buckets: objects written whole and read back, with retries; who may write a run there; copies for reading."""
