"""Exports generators and understanders. Both have the same paged transformer graph."""
