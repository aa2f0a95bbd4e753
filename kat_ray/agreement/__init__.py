"""Whether all engines compute the same model: what they are asked, and how their answers are compared."""
