"""From a released PyTorch checkpoint to a bundle of ONNX graphs: `python -m export --help`. Needs the `export` extra."""
