"""Accuracy of quantized models on the repository's own data, over several seeds."""
