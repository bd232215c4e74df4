"""Tuning as a command: reads and splits photos, learns parameters, judges them, and keeps what gains."""

FEWEST = 50
"""Fewest photos for tuning."""
