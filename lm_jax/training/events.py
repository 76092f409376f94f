"""Metrics as events for TensorBoard."""

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from lm_jax import paths

_FLUSH_EVERY = 30.0  # seconds
_AGAIN_AFTER = 30.0  # until a disk that did not take events is tried again
_NUMBER = itertools.count()  # of a file of this process


class Events:
    """Writes events into a folder; into one in a bucket, when it is closed.

    Not by tensorboardX's `SummaryWriter`: its thread ends when a disk takes no more, and then
    whoever adds another event waits for ever. Here a file that could not be written is given up,
    and another one is begun later. What is left out in between is in metrics.jsonl.
    """

    def __init__(self, folder: str, start: int):
        """
        Args:
          start: the step that the run goes on from; TensorBoard is to forget later ones.
        """
        self._folders = contextlib.ExitStack()
        self._folder = self._folders.enter_context(paths.folder_for_writing(folder))
        self._newest, self._file, self._next_try = start, None, 0.0
        self._library = _tensorboardx()
        self._begin()

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Adds numbers by their names."""
        if self._file is None and time.monotonic() > self._next_try:
            self._begin()
        self._newest = step
        if self._file is None:
            return
        with self._given_up_on_failure():
            for name, value in values.items():
                summary = self._library.summary.scalar(name, value)
                self._write(step=step, summary=summary)
            if time.monotonic() > self._next_flush:
                self._file.flush()
                self._next_flush = time.monotonic() + _FLUSH_EVERY

    def go_back(self, step: int) -> None:
        """What was added of later steps is to be forgotten."""
        self._newest = step
        if self._file is not None:
            with self._given_up_on_failure():
                self._void()
                self._file.flush()

    def close(self) -> None:
        with self._given_up_on_failure():
            if self._file is not None:
                self._file.close()
        self._folders.close()

    def _begin(self) -> None:
        with self._given_up_on_failure():
            os.makedirs(self._folder, exist_ok=True)
            self._file = self._library.event_file_writer.EventsWriter(
                os.path.join(self._folder, "events"), f".{os.getpid()}.{next(_NUMBER)}"
            )
            self._void()
            self._file.flush()
            self._next_flush = time.monotonic() + _FLUSH_EVERY

    def _void(self) -> None:
        """What was said of the steps behind the newest is void."""
        proto = self._library.proto.event_pb2
        log = proto.SessionLog(status=proto.SessionLog.START)
        self._write(step=self._newest + 1, session_log=log)

    def _write(self, **event: Any) -> None:
        event_pb2 = self._library.proto.event_pb2
        self._file.write_event(event_pb2.Event(wall_time=time.time(), **event))

    @contextlib.contextmanager
    def _given_up_on_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            print(f"warning: {self._folder} is not written now: {e}", file=sys.stderr, flush=True)
            self._file, self._next_try = None, time.monotonic() + _AGAIN_AFTER


def _tensorboardx() -> ModuleType:
    """Where PyTorch is installed, it would be imported too, which takes seconds, and scalars need
    none of it."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # as if it were not installed
    try:
        import tensorboardX.event_file_writer
        import tensorboardX.summary
    finally:
        if hidden:
            del sys.modules["torch"]
    return tensorboardX
