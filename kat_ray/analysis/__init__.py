"""Finished runs read again: rules replayed on recorded traces, rules compared over seeds."""
