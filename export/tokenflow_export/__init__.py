"""From a released PyTorch checkpoint to a bundle of ONNX graphs: `tokenflow export --help`. Needs the `export` extra."""
