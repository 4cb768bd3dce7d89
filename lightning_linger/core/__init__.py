"""Numbers, quantizers, tags, sites and the function mode. Imports neither Lightning nor ONNX."""
