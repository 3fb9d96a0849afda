"""Parity checks: run a bundle's stored reference inputs on sessions, and report how the results agree with the stored ones."""
