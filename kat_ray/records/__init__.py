"""Files of a run that others read: traces in Parquet, JSON that may be damaged."""
