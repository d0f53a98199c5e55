"""Grids of runs: what a YAML file asks for, its cells as they are run, and their results in one Parquet file."""
