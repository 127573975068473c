"""How a matrix is stored and multiplied."""
