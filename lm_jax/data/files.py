"""Which files a source string means, and how they are read."""

import difflib
import functools
import glob
import gzip
import os
import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lm_jax import paths
from lm_jax.errors import UserError

JSONL = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
CSV = (".csv", ".tsv")
RECORDS = (*JSONL, *PARQUET, *CSV)  # what examples are read from
# What counts as text when a folder is searched; a file that is named itself may have any extension.
TEXT = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".html", ".htm", ".xml", ".srt"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".kt", ".scala", ".cs"),
    *(".js", ".ts", ".tsx", ".jsx", ".go", ".rs", ".rb", ".php", ".swift", ".jl", ".r", ".lua"),
    *(".sh", ".sql", ".css", ".yaml", ".yml", ".toml", ".ini", ".cfg"),
)
_NO_PYTHON_TEXT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def suffix(path: str) -> str:
    """The extension in lower case, without a final '.gz'."""
    name = path.lower().removesuffix(".gz")
    return os.path.splitext(name)[1]


def find(source: str, known: Sequence[str] | None = None) -> list[str]:
    """The files that `source` (a path, a folder, a glob or 'python:') names, in sorted order.

    Args:
      known: extensions of the files that a folder is searched for; None: text and records of it.

    Raises:
      UserError: there is no such file, or none with a known extension in a folder.
    """
    known = known or (*TEXT, *JSONL, *PARQUET)
    if source == "python:":
        return list(_python_files())
    if paths.remote(source):
        return [paths.local_copy(path) for path in _in_bucket(source, known)]
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        found = [p for p in _walk(path) if suffix(p) in known]
        if not found:
            raise UserError(
                f"data source '{source}': no file in this folder has a known extension"
                f" ({', '.join(known[:3])}, ..., {', '.join(known[-3:])}); name the files with a"
                " glob, and text may have any"
            )
        return found
    if os.path.exists(path):
        return [path]
    if glob.has_magic(path):
        found = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
        if found:
            return found
        fixed = path[: next(i for i, c in enumerate(path) if c in "*?[")]
        folder = os.path.dirname(fixed) or "."
        if not os.path.isdir(folder):
            raise UserError(f"data source '{source}': the folder '{folder}' does not exist")
        raise UserError(f"data source '{source}': no file matches; {_inside(folder)}")
    raise UserError(f"data source '{source}': {_missing(path)}")


def _in_bucket(source: str, known: Sequence[str]) -> list[str]:
    """As `find`; the files are copied to this disk, where documents can be read one by one."""
    if paths.isfile(source):
        return [source]
    if glob.has_magic(source):
        if found := paths.glob_remote(source):
            return found
        raise UserError(f"data source '{source}': no file matches")
    names = [
        name
        for name in paths.files_below(source)
        if not any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))
    ]
    found = [f"{source.rstrip('/')}/{n}" for n in names if suffix(n) in known]
    if not found:
        raise UserError(
            f"data source '{source}': "
            + (
                "no file there has a known extension"
                if names
                else "there is no such file or folder"
            )
        )
    return found


def _walk(folder: str) -> list[str]:
    """Every file below `folder` that is not hidden, sorted."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        found += [os.path.join(root, n) for n in names if not n.startswith(".")]
    return sorted(found)


def _inside(folder: str) -> str:
    names = sorted(n for n in os.listdir(folder) if not n.startswith("."))
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"'{folder}' holds {shown}" if names else f"'{folder}' is empty"


def _missing(path: str) -> str:
    """Says that `path` is missing, and what is there that its name resembles."""
    if ":" in os.path.basename(path) or path in ("python", "tfds"):
        hint = (
            "a source is a path, a folder, a glob, 'python:', 'tfds:NAME[/CONFIG][[SPLIT]]' or"
            " 'tokens:DIR'"
        )
        return f"no such file; {hint}"
    folder, name = os.path.split(path.rstrip(os.sep))
    folder = folder or "."
    if not os.path.isdir(folder):
        parent = Path(folder)
        while not parent.is_dir():
            parent = parent.parent
        return f"no such file: the folder '{folder}' does not exist ('{parent}' does)"
    close = difflib.get_close_matches(name, os.listdir(folder), n=1, cutoff=0.5)
    if close:
        return f"no such file; did you mean '{os.path.join(folder, close[0])}'?"
    return f"no such file; {_inside(folder)}"


@functools.cache
def _python_files() -> tuple[str, ...]:
    """The standard library's sources, without tests: UTF-8 text that every machine already has."""
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _NO_PYTHON_TEXT]
        found += [os.path.join(folder, n) for n in names if n.endswith(".py")]
    kept = []
    for path in sorted(found):
        try:
            with open(path, "rb") as f:
                data = f.read()
            data.decode()
        except (UnicodeDecodeError, OSError):
            continue
        if data:
            kept.append(path)
    if not kept:
        raise UserError(
            f"data source 'python:': no .py files in {root}, this Python's standard library; name "
            "other text in data.sources"
        )
    return tuple(kept)


def read(path: str, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes `start` to `stop` of the (decompressed) file. Holds nothing open: any thread may call.

    A .gz file has no random access: read in parts, it is decompressed once and stays in memory.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        if path.lower().endswith(".gz"):
            if start == 0 and stop is None:
                return _gunzip(path)
            return _gunzip_kept(path)[start:stop]
        with open(path, "rb", buffering=0) as f:
            if start:
                f.seek(start)
            return f.read(-1 if stop is None else stop - start)
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None


def _gunzip(path: str) -> bytes:
    try:
        with gzip.open(path) as f:
            return f.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path}: not a readable gzip file: {e}") from None


_gunzip_kept = functools.cache(_gunzip)


def as_array(path: str) -> np.ndarray:
    """The (decompressed) file as uint8 [bytes], mapped and not read where it is not compressed."""
    if path.lower().endswith(".gz"):
        return np.frombuffer(read(path, 0, 1 << 62), np.uint8)
    try:
        if os.path.getsize(path) == 0:
            return np.zeros(0, np.uint8)
        return np.memmap(path, np.uint8, mode="r")
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
