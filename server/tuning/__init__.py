"""Tuning as a command: photos read and parted, numbers learned and judged, what gains kept beside the weights."""

FEWEST = 50
"""Photos that tuning takes at least."""
