"""Runs batches: options, sizes, compiled programs, results."""
