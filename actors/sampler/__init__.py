"""The student sampler: a vLLM engine, the loop around it, and its stream of chunks."""
