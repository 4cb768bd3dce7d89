"""Integer execution, float/int divergence, and error metrics."""
