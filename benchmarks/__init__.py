"""Timings, side by side in one run: `python benchmarks/run.py --suite cpu`."""
