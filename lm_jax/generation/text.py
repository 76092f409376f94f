"""Generated tokens as text that can be shown at once, and stop strings."""

from collections.abc import Iterable, Sequence
from typing import Protocol


class StreamDecoder(Protocol):
    """Turns ids into text one by one; holds back bytes that are no whole character yet."""

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


class StopFilter:
    """Passes text on up to the first stop string, and never a part of one.

    The first one is that which is complete first (of two, the longer), so that the result does not
    depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""  # the end of the text, while it may be the beginning of a stop string
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that can now be shown."""
        if self.stopped:
            return ""
        self._held += text
        ends = [
            (start + len(stop), start)
            for stop in self._stops
            if (start := self._held.find(stop)) >= 0
        ]
        if ends:
            self.stopped = True
            self._held = self._held[: min(ends)[1]]
            return self.flush()
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._split(keep)
        return shown

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        shown, self._held = self._held, ""
        return shown

    def _split(self, keep: int) -> tuple[str, str]:
        place = len(self._held) - keep
        return self._held[:place], self._held[place:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, short of the whole."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class TextStream:
    """One row's text: decoder, then stop strings.

    Args:
      prompt: ids that go before; what they stand for is not part of the text, but may decide
        whether a space begins it.
    """

    def __init__(self, decoder: StreamDecoder, prompt: Iterable[int], stops: Sequence[str]):
        self._decoder, self._filter = decoder, StopFilter(stops)
        for token in prompt:
            decoder.push(int(token))
        self.text = ""

    @property
    def stopped(self) -> bool:
        return self._filter.stopped

    def push(self, token: int) -> str:
        return self._shown(self._filter.push(self._decoder.push(token)))

    def finish(self) -> str:
        """The rest of the text."""
        rest = "" if self.stopped else self._filter.push(self._decoder.flush())
        return self._shown(rest + self._filter.flush())

    def _shown(self, text: str) -> str:
        self.text += text
        return text
