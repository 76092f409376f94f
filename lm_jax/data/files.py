"""Which files a source string means, and how they are read."""

import difflib
import functools
import glob
import gzip
import io
import os
import stat
import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path

from lm_jax import host_memory, paths
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
_PIECE = 1 << 24  # bytes that are decompressed at a time
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
            return _once(found)
        fixed = path[: next(i for i, c in enumerate(path) if c in "*?[")]
        folder = os.path.dirname(fixed) or "."
        if not os.path.isdir(folder):
            raise UserError(f"data source '{source}': the folder '{folder}' does not exist")
        raise UserError(f"data source '{source}': no file matches; {_inside(folder)}")
    raise UserError(f"data source '{source}': {_missing(path)}")


def _once(found: Sequence[str]) -> list[str]:
    """Each file of a folder once: '**' follows links, and one that leads to a folder above it would
    give all files there again and again."""
    by_place = {}
    for path in sorted(found, key=len):
        folder, name = os.path.split(path)
        by_place.setdefault((os.path.realpath(folder), name), path)
    return sorted(by_place.values())


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


def stamp(path: str) -> tuple[int, int]:
    """Bytes of a file, and when it was changed.

    Raises:
      UserError: it cannot be read, or is no file but a pipe, a device or a folder.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as e:
        raise _unreadable(path, e) from None
    _check_regular(path, found.st_mode)
    return found.st_size, found.st_mtime_ns


def _check_regular(path: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: cannot be read: Is a directory")
    if not stat.S_ISREG(mode):
        raise UserError(
            f"{path}: is a pipe or a device, and documents are read in any order: write what comes"
            " out of it to a file first"
        )


def _unreadable(path: str, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")


def _opened(path: str) -> io.FileIO:
    """Without waiting for somebody to write to a pipe."""
    file = io.FileIO(path, opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK))
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode)
    except UserError:
        file.close()
        raise
    return file


def is_zipped(path: str) -> bool:
    return path.lower().endswith(".gz")


def read(path: str, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes `start` to `stop` of the (decompressed) file; stop None: all from there on. Holds
    nothing open: any thread may call.

    A .gz file has no random access: read in parts, it is decompressed once and stays in memory.

    Raises:
      UserError: the file cannot be read, or ends before `stop`.
    """
    try:
        if is_zipped(path):
            data = _gunzip(path) if start == 0 and stop is None else kept(path)[start:stop]
        else:
            with _opened(path) as f:
                f.seek(start)
                data = f.read() if stop is None else _exactly(f, stop - start)
    except OSError as e:
        raise _unreadable(path, e) from None
    if stop is not None and len(data) < stop - start:
        raise UserError(
            f"{path}: ends at byte {start + len(data)}, before byte {stop}: it was changed since it"
            " was opened"
        )
    return data


def _exactly(f: io.FileIO, size: int) -> bytes:
    """So many bytes, or all that there are: the system gives at most 2 GiB at once."""
    data = f.read(size)
    while len(data) < size and (more := f.read(size - len(data))):
        data += more
    return data


def kept(path: str) -> bytes:
    """A .gz file, decompressed, which stays in memory.

    Raises:
      UserError: it cannot be read.
    """
    return _gunzip_kept(path, stamp(path))


def _gunzip(path: str) -> bytes:
    parts, size, room = [], 0, host_memory.available()
    try:
        with _opened(path) as raw, gzip.GzipFile(fileobj=raw) as f:
            while part := f.read(_PIECE):
                parts.append(part)
                size += len(part)
                if 2 * size > room:  # the parts, and then the whole beside them
                    raise UserError(
                        f"{path}: decompressed, it does not fit in memory ({room / 1e9:.1f} GB are"
                        " free): decompress it to a file, which is read in parts"
                    )
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path}: not a readable gzip file: {e}") from None
    return b"".join(parts)


@functools.cache
def _gunzip_kept(path: str, stamp: tuple[int, int]) -> bytes:
    """`stamp` makes the cache forget a file that was rewritten."""
    del stamp
    return _gunzip(path)
