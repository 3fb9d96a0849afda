"""Bundles on disk: find, validate and read them. Loads no graph."""
