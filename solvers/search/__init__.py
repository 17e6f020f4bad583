"""Local search: swaps until none improves, and what goes beyond."""
