"""The bundled model: gathers its data, trains it, exports it, and measures it."""
