"""A table that can be written as Markdown and LaTeX, and printed on a terminal."""

from dataclasses import dataclass
from pathlib import Path

import rich.table
from rich.text import Text
from tabulate import tabulate

from fedelta.errors import printable
from fedelta.files import write_file

MAX_CELL = 200
MAX_NOTE = 4000
"""Maximum numbers of characters of a cell, and of a title or note. Names in them may come from data and clients."""


@dataclass(frozen=True)
class TextTable:
    """A table of text.

    Args:
        name: name of its files.
        title: a line above the table.
        head: headings of the columns; the first column names the rows.
        rows: one text per column.
        note: explanation of the numbers.
    """

    name: str
    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """The table in Markdown, without title and note."""
        rows = [[printable(cell, MAX_CELL).replace("|", "\\|") for cell in row] for row in [self.head, *self.rows]]
        return self._format("pipe", rows) + "\n"

    def latex(self) -> str:
        """A booktabs tabular in LaTeX, with title and note as comments."""
        comments = "".join(f"% {line}\n" for line in (self.title, self.note) if line)
        return comments + self._format("latex_booktabs", [self.head, *self.rows]) + "\n"

    def console(self) -> rich.table.Table:
        """The table for a terminal, with title and note."""
        title, note = Text(printable(self.title, MAX_NOTE)), Text(printable(self.note, MAX_NOTE)) if self.note else None
        table = rich.table.Table(title=title, caption=note, caption_justify="left")
        for i, name in enumerate(self.head):
            table.add_column(Text(printable(name, MAX_CELL)), justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*(Text(printable(cell, MAX_CELL)) for cell in row))
        return table

    def write(self, folder: Path) -> list[Path]:
        """Write `NAME.md` and `NAME.tex` into the folder and return their paths."""
        paths = [folder / f"{self.name}.md", folder / f"{self.name}.tex"]
        write_file(paths[0], f"**{self.title}**\n\n{self.markdown()}\n{self.note}\n")
        write_file(paths[1], self.latex())
        return paths

    def _format(self, style: str, rows: list[list[str]]) -> str:
        align = ["left"] + ["right"] * (len(self.head) - 1)
        return tabulate(rows[1:], rows[0], tablefmt=style, colalign=align, disable_numparse=True)
