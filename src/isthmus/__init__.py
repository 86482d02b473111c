"""Networks made of the bottleneck residual block."""
