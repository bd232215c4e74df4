"""Parts of benchmarks.soak: the traffic, what is watched meanwhile, and how fast it grows."""
