"""Commands around a run: merging, memory estimates, tiny twins."""
