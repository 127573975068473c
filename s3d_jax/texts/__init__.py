"""Prompts and documents from files."""
