"""Side-by-side cost ratios of the library; run with ``python -m benchmarks``."""
