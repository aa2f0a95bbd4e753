"""The distillation loss and the (k + 1)-way divergence beneath it, in torch."""
