"""The bundle on disk: finding it, checking it, and the text tokenizer and reference that it holds. Runs nothing."""
