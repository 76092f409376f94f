"""How far long work has come: a bar on a terminal, a line from time to time elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_EVERY = 30.0  # seconds between two lines


@contextlib.contextmanager
def progress(
    unit: str, total: int | None = None, *, start: int = 0, active: bool = True
) -> Iterator[Callable[[int], None]]:
    """A counter on stderr: call it with how many are done.

    Args:
      total: how many there are, if that is known.
      start: how many were done before; the time left is told from the others.
      active: whether to show anything; of several processes one does.
    """
    if not active:
        yield lambda done: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(
            total=total, initial=start, unit=f" {unit}", dynamic_ncols=True, leave=False
        ) as bar:
            yield lambda done: bar.update(done - bar.n)
    else:
        yield _lines(unit, total, start)


def _lines(unit: str, total: int | None, start: int) -> Callable[[int], None]:
    began = said = time.monotonic()

    def count(done: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < _EVERY or done == total:
            return
        said = now
        if total is None:
            line = f"{unit}: {done:,} | {clock(now - began)}"
        else:
            line = f"{unit}: {done:,}/{total:,}"
            if done > start:
                left = (now - began) / (done - start) * (total - done)
                line += f" | {clock(left)} left"
        print(line, file=sys.stderr, flush=True)

    return count


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
