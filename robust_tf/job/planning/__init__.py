"""The plan of a job before it runs: its size, and its time and memory on accelerators that need not be present."""
