"""The trap monitor: one named actor around `kat_ray.termination`."""
