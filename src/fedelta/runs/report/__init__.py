"""Report of finished runs: table, plot and page. Plots are slow to import, so import each module by itself."""
