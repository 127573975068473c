"""Where weights come from. `open.open_origin` finds out what a source is, and opens it."""
