"""What a person sees when a run or a comparison has ended: a table, a plot, a page."""

from fedelta.report.page import write_page
from fedelta.report.plot import plot_accuracy
from fedelta.report.table import MethodSummary, console_table, summarise, write_table

__all__ = ["MethodSummary", "console_table", "plot_accuracy", "summarise", "write_page", "write_table"]
