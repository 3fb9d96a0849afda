"""Measures what half precision and 8 bits cost, and finds what engines in them need: nodes to pin, ranges of activations."""
