"""The student's side of a rollout: a vLLM engine, the loop around it, and its stream of chunks."""
