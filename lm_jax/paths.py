"""Files that lie on a local disk or in a bucket (gs://, s3://, and whatever fsspec has a name for).

A local path goes to the operating system as it is. Buckets have no folders, no appending and no
locks, and each read is a request. So a file that is small is read and written whole, one that is
read in parts, such as text, is copied to the local disk first (`local_copy`), and checkpoints are
orbax's own affair.
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from lm_jax.errors import UserError

_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}
_UPLOAD_EVERY = 30.0  # seconds; a log in a bucket is written whole each time
# Of a published model, what is never read: the weights in other formats.
_UNREAD = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".ckpt")


def remote(path: str) -> bool:
    """Whether `path` is a URL and not a local file's name."""
    return re.match(r"[a-z][a-z0-9+.-]+://", path) is not None


def absolute(path: str) -> str:
    return path.rstrip("/") if remote(path) else os.path.abspath(path)


@contextlib.contextmanager
def _bucket(path: str) -> Iterator[tuple[Any, str]]:
    """fsspec's file system of a URL, and the path in it.

    Raises:
      UserError: the package for it is not installed, or it cannot be reached.
    """
    scheme = path.split("://")[0]
    try:
        import fsspec
    except ImportError:
        raise UserError(f"{path}: fsspec is not installed: pip install 'lm_jax[gcs]'") from None
    try:
        with contextlib.suppress(AttributeError):
            fsspec.get_filesystem_class(scheme)
        found = fsspec.core.url_to_fs(path)
    except ImportError as e:
        extra = _EXTRAS.get(scheme)
        advice = f"pip install 'lm_jax[{extra}]'" if extra else str(e)
        raise UserError(f"{path}: what reads {scheme}:// is not installed: {advice}") from None
    except ValueError as e:
        raise UserError(f"{path}: {e}") from None
    except Exception as e:  # no credentials, say; each file system has errors of its own
        raise _unreachable(path, e) from None
    found[0].invalidate_cache()  # another process may have written since
    try:
        yield found
    except (OSError, UserError):
        raise
    except Exception as e:
        raise _unreachable(path, e) from None


def _unreachable(path: str, error: Exception) -> UserError:
    said = (str(error).strip().splitlines() or [""])[0]
    return UserError(f"{path}: cannot be reached: {type(error).__name__}: {said[:300]}")


def exists(path: str) -> bool:
    if not remote(path):
        return os.path.exists(path)
    with _bucket(path) as (fs, inner):
        return fs.exists(inner)


def isdir(path: str) -> bool:
    """In a bucket: whether there is anything below."""
    if not remote(path):
        return os.path.isdir(path)
    with _bucket(path) as (fs, inner):
        return fs.isdir(inner)


def isfile(path: str) -> bool:
    if not remote(path):
        return os.path.isfile(path)
    with _bucket(path) as (fs, inner):
        return fs.isfile(inner)


def listdir(path: str) -> list[str]:
    """The names in a folder, sorted."""
    if not remote(path):
        return sorted(os.listdir(path))
    with _bucket(path) as (fs, inner):
        names = {os.path.basename(p.rstrip("/")) for p in fs.ls(inner, detail=False)}
        return sorted(names - {"", os.path.basename(inner.rstrip("/"))})


def files_below(folder: str) -> dict[str, int]:
    """Every file below a folder, by its path from there, sorted, and its size in bytes."""
    if remote(folder):
        with _bucket(folder) as (fs, inner):
            sizes = {p: info["size"] for p, info in fs.find(inner, detail=True).items()}
            start = len(inner.rstrip("/")) + 1
            return {p[start:]: size for p, size in sorted(sizes.items())}
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            found[os.path.relpath(path, folder)] = os.path.getsize(path)
    return dict(sorted(found.items()))


def glob_remote(pattern: str) -> list[str]:
    """The files in a bucket that match, as URLs, sorted."""
    with _bucket(pattern) as (fs, inner):
        return sorted(fs.unstrip_protocol(p) for p in fs.glob(inner) if fs.isfile(p))


def makedirs(path: str) -> None:
    if not remote(path):
        os.makedirs(path, exist_ok=True)


def read_bytes(path: str) -> bytes:
    if not remote(path):
        with open(path, "rb") as f:
            return f.read()
    with _bucket(path) as (fs, inner):
        return fs.cat_file(inner)


def read_text(path: str) -> str:
    return read_bytes(path).decode("utf-8")


def write_whole(path: str, text: str) -> None:
    """Writes a file so that a reader sees all of it or none."""
    if remote(path):  # an object appears when it is complete
        with _bucket(path) as (fs, inner):
            return fs.pipe_file(inner, text.encode())
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(path + ".tmp", path)


def move(path: str, target: str) -> None:
    """Moves a folder to where there may be others: then to a name with a number behind it."""
    free = (target, *(f"{target}-{n}" for n in range(2, 1000)))
    target = next(name for name in free if not exists(name))
    if remote(path):
        with _bucket(path) as (fs, inner):
            return fs.mv(inner, target.partition("://")[2], recursive=True)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.rename(path, target)


def append(path: str, text: str) -> None:
    """Adds to a file, which is made if it is not there."""
    if remote(path):
        return write_whole(path, (read_text(path) if exists(path) else "") + text)
    with open(path, "a", encoding="utf-8") as f:
        f.write(text)


@contextlib.contextmanager
def locked(path: str, held: str) -> Iterator[None]:
    """Holds the lock of a local file, which is made, against other processes of this machine.

    The lock is the open file's, so a process that is killed leaves none behind.

    Args:
      held: what to say where another one has it, with {process} for which.

    Raises:
      UserError: another process holds it.
    """
    with open(path, "a+", encoding="utf-8") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            who = f.read().strip() or "(unknown)"
            raise UserError(held.replace("{process}", who)) from None
        except OSError:  # a file system without locks
            yield
            return
        f.truncate(0)
        f.write(str(os.getpid()))
        f.flush()
        yield


class Log:
    """A text file that grows.

    In a bucket it is written from time to time, beside what else is done, and by `flush`. That the
    disk or the bucket does not take it is said once; it is tried again with the next lines.
    """

    def __init__(self, path: str):
        self._path, self._file, self._text, self._written = path, None, "", 0.0
        self._uploads = self._upload = None
        self._warned = False
        if not remote(path):
            self._open()
            return
        if exists(path):
            self._text = read_text(path)
        self._uploads = concurrent.futures.ThreadPoolExecutor(1, "lm_jax-log")

    def write(self, text: str) -> None:
        self._text += text
        if self._uploads is None:
            self._put_here()
        elif time.monotonic() - self._written > _UPLOAD_EVERY:
            self._start()

    def _open(self) -> None:
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed in close)
        self._size = os.fstat(self._file.fileno()).st_size

    def _put_here(self) -> None:
        """Adds what there is to the local file, all of it or nothing."""
        try:
            if self._file is None or not os.path.exists(self._path):  # who took it away took all
                if self._file is not None:
                    self._file.close()
                os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
                self._open()
            data = self._text.encode()
            try:
                if self._file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.ftruncate(self._file.fileno(), self._size)
                raise
        except OSError as e:
            self._warn(e)
        else:
            self._size += len(data)
            self._text, self._warned = "", False

    def flush(self) -> None:
        """What was written so far is in the file, if it can be."""
        if self._uploads is None:
            self._put_here()
        else:
            self._start()
            self._upload.result()

    def close(self) -> None:
        if self._uploads is None:
            self._put_here()
            if self._file is not None:
                self._file.close()
            return
        self.flush()
        self._uploads.shutdown()

    def _start(self) -> None:
        if self._upload is not None:
            self._upload.cancel()  # if it has not begun: this one has all of its lines
        self._written = time.monotonic()
        self._upload = self._uploads.submit(self._put, self._text)

    def _put(self, text: str) -> None:
        try:
            write_whole(self._path, text)
        except (OSError, UserError) as e:
            self._warn(e)
        else:
            self._warned = False

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            print(f"warning: {self._path} is not written now: {error}", file=sys.stderr, flush=True)
        self._warned = True


@contextlib.contextmanager
def folder_for_writing(path: str) -> Iterator[str]:
    """A local folder whose files are in `path` at the end: `path` itself, if it is local."""
    if not remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield folder
        put_folder(folder, path)


def put_folder(local: str, path: str) -> None:
    """Copies the files below a local folder into a bucket."""
    with _bucket(path) as (fs, inner):
        for name in files_below(local):
            fs.put_file(os.path.join(local, name), f"{inner.rstrip('/')}/{name}")


def local_copy(path: str) -> str:
    """`path` if it is local, or is not there; else a copy of the file or folder on this disk.

    Copies are kept in LM_JAX_CACHE, or lm_jax/remote in the user's cache folder, under the names
    they have; a file whose size or time has changed is copied anew.

    Raises:
      UserError: it cannot be read, or there is no room for it.
    """
    if not remote(path):
        return path
    cache = os.environ.get("LM_JAX_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"),
        *("lm_jax", "remote"),
    )
    scheme, _, rest = path.rstrip("/").partition("://")
    target = os.path.join(cache, scheme, *(p for p in rest.split("/") if p not in ("", ".", "..")))
    with _bucket(path) as (fs, inner):
        if fs.isfile(inner):
            _copy(fs, inner, target, path)
        elif fs.isdir(inner):
            wanted = {p for p in fs.find(inner) if not p.endswith(_UNREAD)}
            start = len(inner.rstrip("/")) + 1
            for p in sorted(wanted):
                _copy(fs, p, os.path.join(target, p[start:]), f"{path.rstrip('/')}/{p[start:]}")
        else:
            return path
    return target


def _copy(fs: Any, inner: str, target: str, path: str) -> None:
    info = fs.info(inner)
    changed = next((info[k] for k in ("etag", "md5Hash", "ETag", "mtime") if info.get(k)), "")
    stamp, note = f"{info['size']} {changed}", target + ".stamp"
    with contextlib.suppress(OSError), open(note, encoding="utf-8") as f:
        if f.read() == stamp and os.path.getsize(target) == info["size"]:
            return
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        room = shutil.disk_usage(os.path.dirname(target)).free
        if info["size"] > room:
            raise UserError(
                f"{path}: {info['size'] / 1e9:.1f} GB do not fit on the local disk, where files of"
                f" buckets are copied to read them in parts ({room / 1e9:.1f} GB are free in"
                f" {os.path.dirname(target)}): set LM_JAX_CACHE to a folder with more room"
            )
        # Processes of one host may copy at the same time; each puts a whole file in place.
        handle, partial = tempfile.mkstemp(dir=os.path.dirname(target))
        os.close(handle)
        try:
            fs.get_file(inner, partial)
            os.replace(partial, target)
        except BaseException:
            os.unlink(partial)
            raise
        with open(note, "w", encoding="utf-8") as f:
            f.write(stamp)
    except OSError as e:
        raise UserError(f"{path}: cannot be copied to {target}: {e.strerror or e}") from None
