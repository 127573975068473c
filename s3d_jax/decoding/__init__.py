"""Decoding over token ids: pure functions."""
