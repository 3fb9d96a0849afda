"""Images and codes as plain data: loading and preprocessing, `Codes` and its file format, resize matrices."""
