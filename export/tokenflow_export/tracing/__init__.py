"""Traces PyTorch modules to ONNX files, quantizes weights, and compresses files without changing results."""
