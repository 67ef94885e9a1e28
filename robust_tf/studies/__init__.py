"""Studies: grids of transfer jobs that answer whether robust sources transfer better, and their statistics."""
