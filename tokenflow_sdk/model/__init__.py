"""The arithmetic of a model over its sessions: tokenizer graphs, the paged transformer, sampling. No requests, no threads."""
