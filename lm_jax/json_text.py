"""JSON that somebody else wrote, read strictly: what is damaged is an error of one kind."""

import itertools
import json
import math
import re
from typing import Any

_SHOWN = 60  # characters of what a message quotes
# Levels of objects and lists. How many Python itself can read depends on who calls it; what is read
# twice is to be refused twice for the same reason.
_DEEPEST = 200
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
# One that never ends counts to the end: looked for again from each quote inside it, it would take
# time with the square of its length.
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_TOO_DEEP = f"nested too deeply, in more than {_DEEPEST} levels"


class JsonError(ValueError):
    """What is wrong.

    Attributes:
      line, column: where, from 1; None: that cannot be told.
    """

    def __init__(self, message: str, line: int | None = None, column: int | None = None):
        super().__init__(message)
        self.line, self.column = line, column


def loads(text: str | bytes, *, finite: bool = False) -> Any:
    """The value of a JSON text, bytes being UTF-8.

    An object with a key that stands there twice is refused, as readers differ in which one counts.

    Args:
      finite: refuse also numbers that no float can hold, and NaN and Infinity, which Python writes
        and which are no JSON.

    Raises:
      JsonError: it is none.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if text.count("[") + text.count("{") > _DEEPEST and _depth(text) > _DEEPEST:
            raise JsonError(_TOO_DEEP)
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant if finite else None,
            parse_float=_finite if finite else None,
        )
    except UnicodeDecodeError as e:
        line = text.count(b"\n", 0, e.start) + 1
        raise JsonError(f"not UTF-8 at byte {e.start}", line) from None
    except json.JSONDecodeError as e:
        raise JsonError(e.msg, e.lineno, e.colno) from None
    except RecursionError:  # whoever asks is deep down already
        raise JsonError(_TOO_DEEP) from None
    except JsonError:
        raise
    except ValueError:  # Python refuses to take the time that such an integer needs
        raise JsonError("an integer of thousands of digits") from None


def _depth(text: str) -> int:
    """How deep objects and lists lie in one another, at least as far as the text is JSON."""
    brackets = _STRING.sub("", text).encode("utf-8", "replace").translate(None, _NO_BRACKETS)
    runs = re.findall(rb"[\[{]+|[\]}]+", brackets)
    levels = (len(run) if run[0] in b"[{" else -len(run) for run in runs)
    return max(itertools.accumulate(levels), default=0)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise JsonError(f"the key {twice[:_SHOWN]!r} stands there twice")
    return found


def _no_constant(name: str) -> None:
    raise JsonError(f"{name} is no JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise JsonError(f"{text[:_SHOWN]} is too large a number")
    return value
