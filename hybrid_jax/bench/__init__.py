"""Benchmarks: kernels against the floor of their bytes and operations, steps and whole runs of the engine."""
