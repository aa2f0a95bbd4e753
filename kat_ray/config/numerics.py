"""In what arithmetic all roles compute: the section `numerics`."""

from __future__ import annotations

from kat_ray.config.cluster import Section


class NumericsConfig(Section):
    """What sampler, scorers and learner must do alike."""

    fp32_output_layer: bool = False
    """Logits are computed in float32 from hidden states and weights of a half-precision type, by samplers, scorers
    and learner alike; an engine that cannot do so is refused. Off: vLLM rounds logits to its data type, while the
    learner, and scorers on transformers, take float32 all the same. In float32 there is no difference. Without a
    GPU vLLM makes a float32 copy of the output layer in every step."""
