"""Backends behind one interface, `Session`, which runs one graph. Each imports its library on use, never on import."""
