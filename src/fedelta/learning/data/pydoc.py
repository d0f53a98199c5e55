"""The built-in data set: docstrings of Python's standard library, labeled with their chapter.

It is real text that every machine has. Source files are parsed and never imported, so no code runs, and the same
Python version gives the same rows in the same order. The task is to predict the chapter of the library reference
from the docstring alone; small chapters are merged, which leaves eight. The column `module` gives a natural
partition, in which a client is a group of modules.
"""

import ast
import sysconfig
from collections.abc import Iterator
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

MIN_CHARACTERS = 20
"""Length below which a docstring has no content of its own ("See above.")."""


def read_pydoc(library: Path | None = None) -> list[dict[str, str]]:
    """Read the data set: rows with `text`, `label` (the chapter) and `module`, sorted by module, without duplicates.

    Args:
        library: folder of the standard library. None means that of the running Python.

    Raises:
        FedeltaError: if the folder holds no source files.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    chapter_of = {module: chapter for chapter, modules in CHAPTERS.items() for module in modules.split()}
    rows, seen = [], set()
    for module in sorted(chapter_of):
        for text in _docstrings(library, module):
            if len(text) >= MIN_CHARACTERS and text not in seen:
                seen.add(text)
                rows.append({"text": text, "label": chapter_of[module], "module": module})
    if not rows:
        raise FedeltaError(f"data source pydoc: no sources of the standard library under {library}")
    return rows


def _docstrings(library: Path, module: str) -> Iterator[str]:
    package = library / module
    files = sorted(package.rglob("*.py")) if package.is_dir() else [library / f"{module}.py"]
    for file in files:
        parts = file.relative_to(library).parts
        if not file.is_file() or "test" in parts or "tests" in parts or "_vendor" in parts:
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield text
