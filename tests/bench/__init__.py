"""Benchmarks, to be run by hand on a quiet machine. They are not part of the tests."""
