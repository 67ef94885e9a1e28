"""Benchmarks: run by hand on a quiet machine, never part of the test-suite."""
