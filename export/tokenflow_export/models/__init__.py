"""PyTorch definitions of the released models, under the released state-dict keys. Plain and eager: the reference."""
