"""The checkpoint folder, and how files are written."""
