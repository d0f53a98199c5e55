"""Grids of runs: the YAML file, its cells, how they are run, and their results in one Parquet file."""
