"""Data sets: found or downloaded, and read in batches."""
