"""What runs a model's graphs for one batch: tokenizer graphs, the transformer with a paged key/value cache, sampling."""
