"""Placements as a type-checker follows them. Nothing here imports torch."""
