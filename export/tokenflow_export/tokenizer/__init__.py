"""Exports tokenizers."""
