"""`kat-ray watch`: a run on one screen, from its records, while they are written and afterwards."""
