"""From hidden states to logits in float32, as one formula for all models, with its gradients.

A bfloat16 product rounds a logit of 40 to a step of 0.25, and what that does to a softmax is larger than the
gradient of a KL that is nearly 0. The products of logits are therefore float32, whatever the weights are: on a GPU
by the data type of the result, elsewhere on a float32 copy of some rows of the weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_BLOCK = 2**24  # elements of a weight that are in memory as a float32 copy, 64 MiB


@dataclass(frozen=True)
class OutputLayer:
    """logits = cap tanh(scale (W hidden_scale h + b) / cap), elementwise; without a cap, what tanh is given.

    The weight is read from the module whenever it is needed: who trains it may exchange its data.
    """

    head: nn.Linear
    hidden_scale: float = 1.0  # MiniCPM3 and muP models scale hidden states, not logits
    scale: float = 1.0  # Cohere, Granite, Falcon-H1
    cap: float | None = None  # the final soft cap of Gemma 2

    @property
    def weight(self) -> Tensor:
        """[V, H]."""
        return self.head.weight

    @property
    def bias(self) -> Tensor | None:
        """[V]."""
        return self.head.bias

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(self.head.out_features)

    @torch.no_grad()
    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, V] in float32, or float64 where the hidden states are; without gradient."""
        products_NV = self.products(hidden_NH)
        self.finish_(products_NV)
        return products_NV

    def products(self, hidden_NH: Tensor) -> Tensor:
        """W h + b [N, V], what scales and cap are applied to; at least in float32."""
        products_NV = wide_product(hidden_NH, self.weight)
        if self.hidden_scale != 1.0:
            products_NV *= self.hidden_scale
        if self.bias is not None:
            products_NV += self.bias
        return products_NV

    def finish_(self, products_NV: Tensor) -> None:
        """Overwrite `products` with the logits."""
        if self.scale != 1.0:
            products_NV *= self.scale
        if self.cap is not None:
            products_NV.div_(self.cap).tanh_().mul_(self.cap)

    def slopes(self, logits_NV: Tensor) -> Tensor | None:
        """Derivative of each logit in its product, from the logits; None where it is `scale` everywhere."""
        if self.cap is None:
            return None
        return (logits_NV / self.cap).square_().neg_().add_(1.0).mul_(self.scale)


def wide_product(a_NH: Tensor, weight_VH: Tensor) -> Tensor:
    """Products a W^T [N, V] in float32 of arrays in any floating-point type; in float64 if `a` is in that."""
    wide = _wide(a_NH)
    if _is_wide(weight_VH, wide):
        return a_NH.to(wide) @ weight_VH.t()
    if _on_gpu(a_NH, weight_VH):
        return torch.mm(a_NH, weight_VH.t(), out_dtype=wide)
    a_NH = a_NH.to(wide)
    result_NV = a_NH.new_empty((len(a_NH), len(weight_VH)))
    for rows in _blocks(weight_VH):
        torch.mm(a_NH, weight_VH[rows].to(wide).t(), out=result_NV[:, rows])
    return result_NV


def product_with_weight(d_NV: Tensor, weight_VH: Tensor) -> Tensor:
    """Products d W [N, H], the gradient in the hidden states, summed over V in the type of `d`.

    On a GPU `d` is rounded to the weight's type first, which costs each of its elements 2^-9 of itself.
    """
    if _is_wide(weight_VH, d_NV.dtype):
        return d_NV @ weight_VH
    if d_NV.is_cuda:
        return torch.mm(d_NV.to(weight_VH.dtype), weight_VH, out_dtype=d_NV.dtype)
    result_NH = d_NV.new_zeros((len(d_NV), weight_VH.shape[1]))
    for rows in _blocks(weight_VH):
        result_NH.addmm_(d_NV[:, rows], weight_VH[rows].to(d_NV.dtype))
    return result_NH


def add_outer_(sum_VH: Tensor, d_NV: Tensor, hidden_NH: Tensor) -> None:
    """Add d^T h, the gradient in the weight, to a sum in the type of `d`; on a GPU `d` is rounded as above."""
    if not d_NV.is_cuda or hidden_NH.dtype == d_NV.dtype:
        sum_VH.addmm_(d_NV.t(), hidden_NH.to(d_NV.dtype))
        return
    for rows in _blocks(sum_VH):
        sum_VH[rows] += torch.mm(d_NV[:, rows].t().to(hidden_NH.dtype), hidden_NH, out_dtype=d_NV.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _is_wide(weight: Tensor, wide: torch.dtype) -> bool:
    return weight.dtype == wide


def _on_gpu(a: Tensor, weight: Tensor) -> bool:
    return a.is_cuda and a.dtype == weight.dtype


def _blocks(weight_VH: Tensor) -> Iterator[slice]:
    """Rows of a weight, some at a time."""
    step = max(1, _BLOCK // max(1, weight_VH.shape[1]))
    return (slice(first, first + step) for first in range(0, len(weight_VH), step))
