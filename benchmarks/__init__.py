"""Benchmarks: this package beside its peers and the physical limit, in one process and one run."""
