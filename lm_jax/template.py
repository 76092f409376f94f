"""Text with fields that records fill."""

import string

from lm_jax.errors import UserError

_SHOWN = 200  # characters of a template in a message
Span = tuple[int, int]  # from which character of a text to which


class Template:
    """Text with fields in braces: 'Question: {question}'; '{{' is a brace."""

    def __init__(self, text: str, key: str):
        """
        Args:
          key: of the config, for messages.

        Raises:
          UserError: braces that do not pair up, or something else than names in them.
        """
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as e:
            shown = repr(text[:_SHOWN])
            raise UserError(f"{key}: {shown}: {e} ('{{{{' stands for a brace)") from None
        self.parts: list[tuple[str, str | None]] = []
        for before, name, spec, conversion in parts:
            if name is not None and (not name or not name.isidentifier() or spec or conversion):
                raise UserError(
                    f"{key}: {text[:_SHOWN]!r}: in braces stands the name of a field, as in"
                    " '{text}'"
                )
            self.parts.append((before, name))

    @property
    def fields(self) -> list[str]:
        return [name for _, name in self.parts if name is not None]

    def fill(self, values: dict[str, str]) -> tuple[str, tuple[Span, ...]]:
        """The text, and where in it the fields stand."""
        text, spans = "", []
        for before, name in self.parts:
            text += before
            if name is not None:
                spans.append((len(text), len(text) + len(values[name])))
                text += values[name]
        return text, tuple(spans)
