"""What the project claims, measured: each module prints a table for people and, last, one JSON line."""
