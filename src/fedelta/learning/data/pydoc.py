"""The built-in data sets: docstrings of Python's standard library, labeled with their chapter or beside a signature.

It is real text that every machine has. Source files are parsed and never imported, so no code runs, and the same
Python version gives the same rows in the same order. The task is to predict the chapter of the library reference
from the docstring alone; small chapters are merged, which leaves eight. The column `module` gives a natural
partition, in which a client is a group of modules.

The second data set is for language models: the signature of a function, and the first sentence of its docstring.
"""

import ast
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from fedelta.errors import FedeltaError

CHAPTERS = {
    "text": """
        string re difflib textwrap stringprep rlcompleter codecs encodings gettext locale html xml
        _markupbase csv configparser pprint reprlib cmd shlex getopt optparse argparse tokenize
        """,
    "data types": """
        datetime _pydatetime zoneinfo calendar _strptime collections _collections_abc heapq bisect array
        weakref _weakrefset types copy enum graphlib struct typing dataclasses functools operator
        """,
    "numeric": "numbers fractions random statistics decimal _pydecimal colorsys _pylong secrets hashlib hmac",
    "files and persistence": """
        pathlib os posixpath ntpath genericpath nturl2path stat fileinput filecmp tempfile glob fnmatch
        linecache shutil pickle pickletools _compat_pickle copyreg shelve dbm sqlite3 zlib gzip bz2 lzma
        _compression compression zipfile tarfile plistlib netrc tomllib io _pyio mailbox aifc wave chunk sunau
        sndhdr imghdr uu xdrlib
        """,
    "concurrency": """
        threading _threading_local multiprocessing concurrent subprocess sched queue contextvars asyncio
        selectors signal asyncore asynchat pty tty pipes
        """,
    "networking and internet": """
        socket ssl email json mailcap mimetypes base64 quopri webbrowser wsgiref urllib http ftplib poplib
        imaplib smtplib smtpd uuid socketserver xmlrpc ipaddress cgi cgitb nntplib telnetlib
        """,
    "language and runtime": """
        contextlib abc _py_abc atexit traceback __future__ gc inspect site sysconfig _sitebuiltins warnings
        builtins code codeop importlib imp zipimport pkgutil runpy modulefinder ast symtable keyword token
        dis opcode _opcode_metadata pyclbr py_compile compileall ctypes platform getpass _osx_support
        _aix_support _bootsubprocess crypt annotationlib
        """,
    "development tools": """
        pydoc doctest unittest pdb bdb profile cProfile pstats timeit trace tracemalloc ensurepip venv
        zipapp logging tabnanny _pyrepl
        """,
}
"""Chapter → top-level modules. Other modules (GUI, tests, obsolete packaging) are omitted."""

Row = dict[str, str]
MIN_CHARACTERS = 20
"""Length below which a docstring has no content of its own ("See above.")."""


def read_pydoc(library: Path | None = None) -> list[dict[str, str]]:
    """Read the data set: rows with `text`, `label` (the chapter) and `module`, sorted by module, without duplicates.

    Args:
        library: folder of the standard library. None means that of the running Python.

    Raises:
        FedeltaError: if the folder holds no source files.
    """

    def texts(library: Path, module: str, chapter: str) -> Iterator[tuple[str, Row]]:
        for text in _docstrings(library, module):
            if len(text) >= MIN_CHARACTERS:
                yield text, {"text": text, "label": chapter, "module": module}

    return _rows("pydoc", library, texts)


def _rows(source: str, library: Path | None, read: Callable[[Path, str, str], Iterator[tuple[str, Row]]]) -> list[Row]:
    """Collect the rows of all modules, sorted by module, without a text that has come before.

    Args:
        source: name of the data set in errors.
        library: folder of the standard library. None means that of the running Python.
        read: library, module and chapter → each row with the text that makes it unique.

    Raises:
        FedeltaError: if there are no rows.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    chapter_of = {module: chapter for chapter, modules in CHAPTERS.items() for module in modules.split()}
    rows: dict[str, Row] = {}
    for module, chapter in sorted(chapter_of.items()):
        for text, row in read(library, module, chapter):
            rows.setdefault(text, row)
    if not rows:
        raise FedeltaError(f"data source {source}: no sources of the standard library under {library}")
    return list(rows.values())


SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<=[a-z0-9)'\"`\]])[.!?](?=\s+[^a-z0-9\s]|$)")
"""End of a sentence, but not the dots of `e.g.`, of an ellipsis or of a version number."""
MIN_SUMMARY, MAX_SUMMARY, MAX_SIGNATURE = 15, 160, 160
"""Characters of a first sentence and of a signature. Longer ones are lists of options, not sentences."""


def read_functions(library: Path | None = None) -> list[dict[str, str]]:
    """Read functions of the standard library: rows with `signature`, `summary`, `module` and `chapter`, by module.

    The signature is that of a `def` statement, with the class of a method in front of its name. The summary is the
    first sentence of the docstring. A summary that occurs twice is kept once, so no test row is a training row.

    Args:
        library: folder of the standard library. None means that of the running Python.

    Raises:
        FedeltaError: if the folder holds no source files.
    """

    def functions(library: Path, module: str, chapter: str) -> Iterator[tuple[str, Row]]:
        for name, node in _functions(library, module):
            summary = _first_sentence(ast.get_docstring(node) or "")
            signature = f"def {name}({ast.unparse(node.args)})"
            if MIN_SUMMARY <= len(summary) <= MAX_SUMMARY and len(signature) <= MAX_SIGNATURE:
                yield summary, {"signature": signature, "summary": summary, "module": module, "chapter": chapter}

    return _rows("pydoc-functions", library, functions)


def _first_sentence(docstring: str) -> str:
    """Return the first sentence in one line, without its quotes and with one period; empty if there is none."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    end = SENTENCE_END.search(paragraph)
    sentence = (paragraph[: end.start()] if end else paragraph).rstrip(" :")
    # Some docstrings begin with the signature itself: `name(arguments) -> result`.
    is_sentence = sentence[:1].isupper() and " " in sentence and "->" not in sentence and sentence.isprintable()
    return f"{sentence}." if is_sentence else ""


def _functions(library: Path, module: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield the functions and methods of a module with their qualified names, in the order of its source."""
    for tree in _trees(library, module):
        nodes: list[tuple[str, ast.AST]] = [("", tree)]
        while nodes:
            prefix, node = nodes.pop(0)
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{prefix}{child.name}", child
                elif isinstance(child, ast.ClassDef):
                    nodes.append((f"{child.name}.", child))


def _docstrings(library: Path, module: str) -> Iterator[str]:
    for tree in _trees(library, module):
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield text


def _trees(library: Path, module: str) -> Iterator[ast.Module]:
    """Parse the source files of a module, without its tests and copies of other projects."""
    package = library / module
    files = sorted(package.rglob("*.py")) if package.is_dir() else [library / f"{module}.py"]
    for file in files:
        parts = file.relative_to(library).parts
        if not file.is_file() or "test" in parts or "tests" in parts or "_vendor" in parts:
            continue
        yield ast.parse(file.read_bytes())
