"""Finished runs read again: rules and objectives replayed on recorded traces, rules compared over seeds."""
