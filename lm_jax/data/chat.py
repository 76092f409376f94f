"""Chat templates: conversations as the text that a published model was trained to continue.

template = load_chat_template(folder)
ids = template.encode(tokenizer, messages, add_generation_prompt=True)

A template is a Jinja program that comes with a model. It runs in a sandbox (`chat_sandbox`), with
the names, filters and settings that Transformers 5 gives it. A model that came without one and
learned to chat has ours.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_jax import paths
from lm_jax.data import chat_sandbox
from lm_jax.data.chat_sandbox import MOST_CHARACTERS
from lm_jax.data.tokenizer import load_tokenizer
from lm_jax.data.tokenizer_base import Tokenizer
from lm_jax.data.tokenizer_families import CONFIG
from lm_jax.data.tokenizer_files import content
from lm_jax.data.tokenizer_published import HuggingFaceTokenizer
from lm_jax.errors import UserError

FILE = "chat_template.jinja"
_NAMED = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]

# What ours is rendered with in place of the names of specials: no text has these (Unicode 23.7).
_BEGIN, _END = "\ufdd0", "\ufdd1"

# The day that it is in examples, which are to be the same on any day: the one that Llama 3.1's
# template has where there is no clock.
DAY_OF_EXAMPLES = datetime.datetime(2024, 7, 26)

Message = Mapping[str, Any]


class ChatTemplate:
    """A template, ready to render. It may be used by several threads at once.

    Attributes:
      text: the Jinja source.
      specials: the text of 'bos_token', 'eos_token' and so on, which the template can name.
    """

    def __init__(self, text: str, specials: Mapping[str, str]):
        """
        Raises:
          UserError: the template cannot be compiled.
        """
        import jinja2

        self.text, self.specials = text, dict(specials)
        try:
            self._template = chat_sandbox.environment().from_string(text)
        except jinja2.TemplateSyntaxError as e:
            raise UserError(f"the chat template, line {e.lineno}: {e.message}") from None
        # What it is compiled to is Python, which has bounds of its own.
        except (jinja2.TemplateError, RecursionError, ValueError, SyntaxError, MemoryError) as e:
            reason = str(e) or type(e).__name__
            raise UserError(f"the chat template cannot be compiled: {reason}") from None

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        now: datetime.datetime | None = None,
    ) -> str:
        """The conversation as text.

        Args:
          messages: objects with 'role' and 'content', as in OpenAI's interface. A key whose value
            is None is left out.
          add_generation_prompt: end with what begins an answer.
          now: the time, for a template that tells it; None: the clock's.

        Raises:
          UserError: there is no message; the template refuses these, fails, or does not come to an
            end.
        """
        if not messages:
            raise UserError("messages: there are none")
        plain = [{k: v for k, v in message.items() if v is not None} for message in messages]
        given = {
            "messages": plain,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": lambda form: (now or datetime.datetime.now()).strftime(form),
        }
        parts, size = [], 0
        try:
            with chat_sandbox.metered() as names:
                for part in self._template.generate(**self.specials, **given, **names):
                    parts.append(part)
                    size += len(part)
                    if size > MOST_CHARACTERS:
                        raise UserError(f"it wrote more than {MOST_CHARACTERS:,} characters")
        except Exception as e:  # whatever Python raises for what the template does
            reason = str(e) or type(e).__name__
            raise UserError(f"the chat template does not take these messages: {reason}") from e
        return "".join(parts)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        now: datetime.datetime | None = None,
    ) -> np.ndarray:
        """The conversation as ids, int32[n], as `apply_chat_template` of Transformers has them.

        Special tokens are read out of all of the text, and nothing is added before or behind.

        Args:
          add_generation_prompt, now: see `render`.

        Raises:
          UserError: see `render`.
        """
        return tokenizer.encode_with_specials(self.render(messages, add_generation_prompt, now))

    def check_literal(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
        """
        Raises:
          UserError: a message holds the name of a special token, which would be read as that.
        """
        for n, message in enumerate(messages, 1):
            for name in filter(None, map(tokenizer.special_in, _said(message))):
                raise UserError(
                    f"message {n} holds '{name}', which with this chat template is read as the"
                    " special token of that name, and not as a text to be learned"
                )


class _Ours(ChatTemplate):
    """Each message on a line, 'User: ...', but what the assistant says ends with eos. What messages
    say is text, whatever it says."""

    def __init__(self, begin: str, end: str):
        super().__init__(_ours(json.dumps(begin), json.dumps(end)), {})
        names = {"begin": _BEGIN, "end": _END}
        self._parted = ChatTemplate(_ours(*names), names)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        now: datetime.datetime | None = None,
    ) -> np.ndarray:
        if any(mark in text for m in messages for text in _said(m) for mark in (_BEGIN, _END)):
            raise UserError("a message holds U+FDD0 or U+FDD1, which stand for no character")
        text = self._parted.render(messages, add_generation_prompt, now)
        own = {_BEGIN: tokenizer.begin_id, _END: tokenizer.eos_id}
        return tokenizer.encode_with_marks(text, own)

    def check_literal(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
        """It holds for any."""


def _said(message: Message) -> list[str]:
    return [value for value in message.values() if isinstance(value, str)]


def load_chat_template(path: str | Path) -> ChatTemplate | None:
    """The template of a published model's folder, or of a run that began with one.

    Args:
      path: the folder, or a tokenizer's.

    Returns:
      None: there is none.

    Raises:
      UserError: there is no tokenizer either; it or the template cannot be read.
    """
    inner = f"{str(path).rstrip('/')}/tokenizer"  # a run's
    return chat_template_of(load_tokenizer(inner if paths.isdir(inner) else path))


def chat_template_of(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template that came with a tokenizer, None if none did: that of chat_template.jinja, else
    of tokenizer_config.json, and of several the one called 'default'.

    Raises:
      UserError: it cannot be compiled, or is no text.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return None
    config = json.loads(tokenizer.companions.get(CONFIG, b"{}"))
    text = config.get("chat_template")
    if isinstance(text, list):
        named = [t for t in text if isinstance(t, dict) and t.get("name") == "default"]
        text = named[0].get("template") if named else None
    if FILE in tokenizer.companions:
        try:
            text = tokenizer.companions[FILE].decode()
        except UnicodeDecodeError:
            raise UserError(f"{FILE}: not UTF-8") from None
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(f"{CONFIG}: chat_template is neither text nor a list of named ones")
    if tokenizer.eos_id is not None and text == (ours := _ours_of(tokenizer)).text:
        return ours
    names = {key: content(config.get(key)) for key in _NAMED}
    return ChatTemplate(text, {k: name for k, name in names.items() if isinstance(name, str)})


def chat_template_for(tokenizer: Tokenizer, objective: str) -> ChatTemplate | None:
    """The template that a model's conversations have: that of its tokenizer or, where none came
    with it and the model was trained for objective 'chat', ours; None: it knows no conversations.

    Raises:
      UserError: see `chat_template_of`; or ours needs an eos, and there is none.
    """
    found = chat_template_of(tokenizer)
    return _ours_of(tokenizer) if found is None and objective == "chat" else found


def _ours_of(tokenizer: Tokenizer) -> ChatTemplate:
    if tokenizer.eos_id is None:
        raise UserError(
            f"this tokenizer ({tokenizer.kind}) has no token that ends what an assistant says:"
            " take another tokenizer.kind (sentencepiece, bytes)"
        )
    return _Ours(*(tokenizer.specials[i] for i in (tokenizer.begin_id, tokenizer.eos_id)))


def _ours(begin: str, end: str) -> str:
    """Its source; `begin` and `end` are expressions of Jinja."""
    return (
        f"{{{{ {begin} }}}}"
        "{% for message in messages %}"
        "{{ message.role | capitalize }}: {{ message.content | trim }}"
        f"{{{{ {end} if message.role == 'assistant' else '\n' }}}}"
        "{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    )
