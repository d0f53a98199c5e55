"""One table for people who read Markdown, LaTeX or a terminal."""

from dataclasses import dataclass
from pathlib import Path

import rich.table
from tabulate import tabulate

from fedelta.atomic import write_file


@dataclass(frozen=True)
class TextTable:
    """A table of finished cells.

    Args:
        name: of its files.
        title: a line above it.
        head: of the columns; the first names the rows.
        rows: of as many cells.
        note: what the figures are.
    """

    name: str
    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """The bare table."""
        return self._format("pipe") + "\n"

    def latex(self) -> str:
        """A booktabs tabular with title and note as comments."""
        comments = "".join(f"% {line}\n" for line in (self.title, self.note) if line)
        return comments + self._format("latex_booktabs") + "\n"

    def console(self) -> rich.table.Table:
        table = rich.table.Table(title=self.title, caption=self.note or None, caption_justify="left")
        for i, name in enumerate(self.head):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def write(self, folder: Path) -> list[Path]:
        """`NAME.md` and `NAME.tex`."""
        paths = [folder / f"{self.name}.md", folder / f"{self.name}.tex"]
        write_file(paths[0], f"**{self.title}**\n\n{self.markdown()}\n{self.note}\n")
        write_file(paths[1], self.latex())
        return paths

    def _format(self, style: str) -> str:
        align = ["left"] + ["right"] * (len(self.head) - 1)
        return tabulate(self.rows, self.head, tablefmt=style, colalign=align, disable_numparse=True)
