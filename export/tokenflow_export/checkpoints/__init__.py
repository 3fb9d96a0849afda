"""Reading released checkpoints: strict about keys and shapes, never unpickling code."""
