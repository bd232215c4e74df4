"""Parts of benchmarks.soak: the traffic, the samples, and their growth."""
