"""From a PyTorch module to an ONNX file: tracing, fewer bits for weights, smaller files for the same numbers."""
