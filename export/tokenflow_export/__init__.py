"""Exports released PyTorch checkpoints to bundles of ONNX graphs: `tokenflow export --help`. Needs the extra `export`."""
