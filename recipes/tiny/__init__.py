"""The bundled model: its data, its training, its figures."""
