"""The trap monitor: an actor around `kat_ray.termination`."""
