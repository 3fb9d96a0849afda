"""Passes that rewrite ONNX graphs for engines: half precision, 8-bit convolutions, float products. None opens a session."""
