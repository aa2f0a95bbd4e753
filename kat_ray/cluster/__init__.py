"""What a run asks of a cluster, decided without Ray: roles, scaling, heartbeats, tokens, versions."""
