"""Parts of benchmarks.serving: goals, servers and their processes, load generators, and the measurements with them."""
