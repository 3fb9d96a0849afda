"""Passes that rewrite a bundle's ONNX graphs before engines are built: half precision, 8-bit convolutions, dequantization."""
