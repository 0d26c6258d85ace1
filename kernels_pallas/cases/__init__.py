"""Kernels as a benchmark runs them: shapes, inputs, and the least that they must move and compute."""
