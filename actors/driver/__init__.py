"""One run from configuration to summary: the loop, the dispatch of rollouts, evaluation, what is recorded."""
