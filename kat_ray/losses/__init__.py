"""The loss in torch: the divergence of two models, the terms built on it, the output layer with its gradients."""
