"""What a job will cost before it runs: its table, time and memory on accelerators that need not be here."""
