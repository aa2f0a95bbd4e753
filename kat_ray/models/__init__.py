"""Hugging Face models: inspected before anything starts, then loaded."""
