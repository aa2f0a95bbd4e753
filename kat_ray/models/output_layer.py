"""A model's output layer, and what its code does to the logits behind it.

Some models scale or cap their logits after the output layer, or scale hidden states before it: by which number,
under which name of the configuration, and whether it is multiplied or divided by, differs from family to family. So
the code is asked: numbers are planted in place of the hidden states and of the output layer's products, in float64,
and what the model makes of them is read off. What is not one scale and one soft cap is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kat_ray.errors import UserError
from kat_ray.losses.output_layer import OutputLayer
from kat_ray.models.text_model import text_decoder

_TOKENS = 4
_SMALL, _LARGE = 1e-6, 1e6  # products whose logits show the scale and the cap


def output_layer(model: Any) -> OutputLayer:
    """The output layer of a causal language model of transformers; runs it on four tokens.

    UserError where logits are not made from the body's hidden states by one matrix, scales and a soft cap.
    """
    kind, head, body = type(model).__name__, model.get_output_embeddings(), text_decoder(model)
    if not isinstance(head, nn.Linear) or body is model:
        raise UserError(f"{kind} has no single linear output layer over a body: {_CONSEQUENCE}")
    probe = _Probe(body, head)
    try:
        logits = probe.run(model)
    except RuntimeError as error:  # what stands between the two has weights, which do not take float64
        first = str(error).split("\n")[0]
        raise UserError(f"{kind} does more between body and output layer ({first}): {_CONSEQUENCE}") from error
    if probe.head_input is None or logits.shape != probe.products.shape:
        raise UserError(f"{kind} does not take its logits from its output layer as they are: {_CONSEQUENCE}")
    scale, cap = _scale_and_cap(probe.products, logits, kind)
    return OutputLayer(head, _hidden_scale(model, probe, kind), scale, cap)


_CONSEQUENCE = "the loss and the scores take them from there, and would be those of another distribution"


class _Probe:
    """Plants hidden states and products in one pass, and keeps what the output layer was given."""

    def __init__(self, body: Any, head: nn.Linear) -> None:
        self._body, self._head = body, head
        device = head.weight.device
        self.hidden = torch.tensor([0.5, -1.0, 2.0, -4.0], device=device, dtype=torch.float64)
        self.hidden = self.hidden.repeat(_TOKENS * head.in_features)[: _TOKENS * head.in_features]
        self.hidden = self.hidden.view(1, _TOKENS, head.in_features)
        self.products = torch.linspace(-300, 300, _TOKENS * head.out_features, device=device, dtype=torch.float64)
        self.products[:3] = torch.tensor([_SMALL, _LARGE, -_LARGE])
        self.products = self.products.view(1, _TOKENS, head.out_features)
        self.head_input: Tensor | None = None
        self.planted = False  # whether the body was called as a module, so that its output could be replaced

    @torch.no_grad()
    def run(self, model: Any) -> Tensor:
        """The logits."""
        handles = [
            self._body.register_forward_hook(self._after_body),
            self._head.register_forward_pre_hook(self._before_head),
            self._head.register_forward_hook(lambda *_: self.products),
        ]
        try:
            logits: Tensor = model(input_ids=token_ids(model), use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits

    def _after_body(self, _module: Any, _arguments: Any, output: Any) -> Any:
        self.planted = True
        if isinstance(output, tuple):
            return (self.hidden, *output[1:])
        output["last_hidden_state"] = self.hidden
        return output

    def _before_head(self, _module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        self.head_input = arguments[0]
        return (torch.zeros_like(arguments[0], dtype=self._head.weight.dtype),)


def token_ids(model: Any) -> Tensor:
    """A few token ids [1, 4] that the model has."""
    ids = torch.arange(_TOKENS, device=model.get_output_embeddings().weight.device)
    return ids[None] % model.config.get_text_config().vocab_size


def _scale_and_cap(products: Tensor, logits: Tensor, kind: str) -> tuple[float, float | None]:
    given, seen = products.flatten(), logits.flatten().double()
    scale = _plain(float(seen[0]) / _SMALL)
    cap = None if torch.isclose(seen[1], scale * given[1], rtol=1e-3) else _plain(float(seen[1]))
    expected = given * scale if cap is None else torch.tanh(given * scale / cap) * cap
    if scale <= 0 or not torch.allclose(seen, expected, rtol=1e-4, atol=1e-7):
        raise UserError(
            f"{kind} changes its logits behind the output layer by something else than a scale and a soft cap: "
            f"{_CONSEQUENCE}"
        )
    return scale, cap


def _hidden_scale(model: Any, probe: _Probe, kind: str) -> float:
    assert probe.head_input is not None
    if probe.planted:
        hidden, scale = probe.hidden, _plain(float(probe.head_input[0, 0, 0] / probe.hidden[0, 0, 0]))
    else:
        with torch.no_grad():
            hidden, scale = text_decoder(model)(input_ids=token_ids(model), use_cache=False)[0], 1.0
    if probe.head_input.shape != hidden.shape or not torch.allclose(
        probe.head_input.double(), hidden.double() * scale, rtol=1e-3, atol=1e-6
    ):
        raise UserError(f"{kind} does more between body and output layer than to scale: {_CONSEQUENCE}")
    return scale


def _plain(value: float) -> float:
    """Without the rounding of the steps in which it was made, where that is all."""
    return float(f"{value:.7g}")
