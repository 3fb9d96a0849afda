"""Pictures and codes as plain data: reading and fitting images, `Codes` and its file format, resize matrices."""
