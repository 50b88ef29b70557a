"""Data sets, arrays and batches."""
