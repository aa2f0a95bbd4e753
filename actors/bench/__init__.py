"""The benchmark: what the pipeline costs, against its peer and against the machine's limits. `kat-ray bench`."""
