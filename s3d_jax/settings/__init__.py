"""Frozen, validated settings, without jax."""
