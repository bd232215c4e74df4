"""The cost and agreement of each `r` on this machine: measured as a curve, stored, found again, and simulated."""
