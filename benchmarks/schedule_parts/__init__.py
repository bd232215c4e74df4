"""Parts of benchmarks.schedule: the search and its surrogate, the answers that it compares, and latencies."""
