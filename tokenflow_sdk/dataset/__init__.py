"""Data sets of pictures to data sets of codes: `tokenflow tokenize`, and reading back what it wrote."""
