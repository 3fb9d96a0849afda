"""Comparing what sessions compute with a bundle's stored reference: sessions in, a report out."""
