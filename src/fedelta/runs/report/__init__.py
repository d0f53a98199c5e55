"""What a person sees in the end: a table, a plot, a page. Plots are slow to import: take what you need by module."""
