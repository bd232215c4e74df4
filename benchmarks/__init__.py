"""Measurements behind the project's claims. Each module prints a table for people and, last, one JSON line."""
