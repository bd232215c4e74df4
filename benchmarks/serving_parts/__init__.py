"""benchmarks.serving in parts: goals, servers and their processes, load generators, and what is measured with them."""
