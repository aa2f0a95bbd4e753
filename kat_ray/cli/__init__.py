"""The `kat-ray` command line. Commands import what they need when they run."""
