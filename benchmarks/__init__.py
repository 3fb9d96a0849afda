"""Benchmarks, which are run by hand; see README.md here."""
