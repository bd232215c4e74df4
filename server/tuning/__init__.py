"""Tuning as a command: reads and splits photos, learns parameters, judges them, and keeps those that gain."""

FEWEST = 50
"""Fewest photos for tuning."""
