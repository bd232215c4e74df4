"""What each `r` costs and keeps on this machine: measured as a curve, stored, found again, and simulated."""
