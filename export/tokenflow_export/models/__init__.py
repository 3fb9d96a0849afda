"""PyTorch definitions of the released models under the released state-dict keys: the reference for everything else."""
