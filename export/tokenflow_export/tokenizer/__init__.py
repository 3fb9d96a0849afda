"""A tokenizer checkpoint to a bundle."""
