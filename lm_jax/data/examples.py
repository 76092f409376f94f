"""Examples: what is asked and what is to be answered, made of the fields of records."""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import Any

from lm_jax.config import DataConfig
from lm_jax.data.nested import flat
from lm_jax.data.records import Record, Records, kind
from lm_jax.errors import UserError
from lm_jax.template import Span, Template


@dataclasses.dataclass(frozen=True)
class Example:
    """One example; one without targets stands for a record that was skipped.

    Attributes:
      prompt: what is given; of objective 'classify' the text.
      fields: the parts of `prompt` that a record's fields hold, all else is the template's; None:
        all of it, and of a conversation each message.
      targets: right answers, of which the first is learned; the name of the class. One that is ''
        says that there is no answer.
      label: of objective 'classify', the number of the class.
      context: of objective 'extract', the text that the targets are parts of.
      start: of objective 'extract', the character of `context` at which the first target begins.
      misplaced: of objective 'extract', why that cannot be told: it can be scored by, not learned.
      messages: of objective 'chat', the conversation, {'role': ..., 'content': ...} each; the last
        is the assistant's.
      origin: the records that it was made of, and which of them.
    """

    prompt: str
    targets: tuple[str, ...]
    label: int = 0
    messages: tuple[dict[str, str], ...] = ()
    context: str = ""
    start: int = 0
    misplaced: str = ""
    fields: tuple[Span, ...] | None = None
    origin: tuple[Records, int] | None = dataclasses.field(default=None, compare=False, repr=False)

    def bad(self, why: str) -> None:
        """Says that it cannot be used: raises, with the place of its record, or counts it, as
        `data.on_error` has it.

        Raises:
          UserError: see above.
        """
        if self.origin is None:
            raise UserError(why)
        records, i = self.origin
        records.bad(i, why)

    @property
    def text(self) -> str:
        """All of it that a tokenizer can learn from."""
        if self.context:  # the answer is a part of it
            return f"{self.context}\n{self.prompt}"
        return "\n".join((self.prompt, *self.targets[:1]))


SKIPPED = Example("", ())
_SHOWN = 80  # characters of a value in a message


def fields_of(config: DataConfig) -> list[str]:
    """The fields that examples are made of."""
    found = Template(config.prompt, "data.prompt").fields
    found += Template(config.target, "data.target").fields
    found += Template(config.context, "data.context").fields
    found += [config.answer_starts] if config.answer_starts else []
    return list(dict.fromkeys(found))


class Examples(Sequence):
    """The examples of one file or data set; `[i]` is SKIPPED where a record was."""

    def __init__(self, records: Records, config: DataConfig, where: str):
        """
        Raises:
          UserError: no record has a field that a template names.
        """
        self.records, self.objective, self.labels = records, config.objective, config.labels
        self.prompt = Template(config.prompt, "data.prompt")
        self.target = Template(config.target, "data.target")
        self.context = Template(config.context, "data.context")
        self.starts, self.unanswerable = config.answer_starts, config.unanswerable
        if records.fields is not None:
            for name in fields_of(config):
                if name != self.starts and name not in records.fields:
                    raise UserError(f"{where}: {self._missing(name, records.fields)}")
        elif len(records):
            self[0]  # a wrong template is better known now than in the middle of a run

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Example:
        record = self.records[i]
        if record is None:
            return SKIPPED
        record = flat(record)
        if self.objective == "chat" and not self.target.parts:
            return self._conversation(record, i)
        origin = self.records, i
        try:
            prompt, fields = self._fill(self.prompt, record)
            targets = self._targets(record)
            if self.objective == "extract":
                context, _ = self._fill(self.context, record)
                place = self._place(record, context, targets[0])
                return Example(prompt, targets, context=context, **place, origin=origin)
            label = self._label(record, targets[0]) if self.objective == "classify" else 0
        except KeyError as e:
            return self._bad(i, self._missing(e.args[0], list(record)))
        except ValueError as e:
            return self._bad(i, str(e))
        if self.objective == "classify":
            targets = (self.labels[label],)
        messages: tuple[dict[str, str], ...] = ()
        if self.objective == "chat":
            messages = (_said("user", prompt), _said("assistant", targets[0]))
        return Example(prompt, targets, label, messages, fields=fields, origin=origin)

    def _conversation(self, record: Record, i: int) -> Example:
        """Of objective 'chat' without a target: the prompt's one field holds the messages."""
        (name,) = self.prompt.fields
        if name not in record:
            return self._bad(i, self._missing(name, list(record)))
        try:
            messages = _messages(record[name], name)
        except ValueError as e:
            return self._bad(i, str(e))
        text, said = "\n".join(m["content"] for m in messages[:-1]), messages[-1]["content"]
        return Example(text, (said,), messages=messages, origin=(self.records, i))

    def _targets(self, record: Record) -> tuple[str, ...]:
        several = [name for name in self.target.fields if isinstance(record[name], list)]
        if len(several) > 1:
            raise ValueError(f"'{several[0]}' and '{several[1]}' are both lists: one may be")
        records = [record]
        if several:
            records = [record | {several[0]: one} for one in record[several[0]]]
        found = [self._fill(self.target, one)[0] for one in records]
        found = [text for text in found if text.strip()]
        if not found and not self.unanswerable:
            what = f"'{several[0]}' is" if several else "the target is"
            raise ValueError(
                f"{what} empty: there is nothing to answer. If that is right, as in SQuAD 2.0, set"
                " data.unanswerable=True"
            )
        return tuple(dict.fromkeys(found)) or ("",)

    def _fill(self, template: Template, record: Record) -> tuple[str, tuple[Span, ...]]:
        return template.fill({name: _text(record, name) for name in template.fields})

    def _place(self, record: Record, context: str, answer: str) -> dict[str, Any]:
        """Where in `context` the answer begins, as fields of an `Example`."""
        try:
            return {"start": self._start(record, context, answer) if answer else 0}
        except KeyError as e:
            return {"misplaced": self._missing(e.args[0], list(record))}
        except ValueError as e:
            return {"misplaced": str(e)}

    def _start(self, record: Record, context: str, answer: str) -> int:
        """The character of `context` at which `answer` begins."""
        if not self.starts:
            if (start := context.find(answer)) < 0:
                raise ValueError(f"the answer {answer[:80]!r} is no part of the context")
            return start
        starts = record[self.starts]
        start = starts[0] if isinstance(starts, list) and starts else starts
        if isinstance(start, bool) or not isinstance(start, int):
            raise ValueError(f"'{self.starts}' must be a number or several, not {kind(start)}")
        if start < 0 or not context.startswith(answer, start):
            there = context[max(start, 0) : max(start, 0) + len(answer)][:80]
            raise ValueError(
                f"at character {start} of the context stands {there!r} and not the answer"
                f" {answer[:80]!r}: check '{self.starts}', or set data.answer_starts='' to have the"
                " answer looked for"
            )
        return start

    def _label(self, record: Record, value: str) -> int:
        """The number of a class. An integer in a record is that; a text is a name, and where no
        name is made of digits, digits (CSV has texts alone) are the number."""
        number = self._is_number(record)
        if not number and value in self.labels:
            return self.labels.index(value)
        if number or (value.isdecimal() and not any(map(str.isdecimal, self.labels))):
            if 0 <= int(value) < len(self.labels):
                return int(value)
            raise ValueError(
                f"there is no class of the number {value[:_SHOWN]}: data.labels"
                f" ({', '.join(self.labels)}) are 0 to {len(self.labels) - 1}"
                + (", and a name stands in quotes" if value in self.labels else "")
            )
        near = difflib.get_close_matches(value[:_SHOWN], self.labels, n=1)
        raise ValueError(
            f"'{value[:_SHOWN]}' is none of data.labels ({', '.join(self.labels)})"
            + (f"; did you mean '{near[0]}'?" if near else "")
        )

    def _is_number(self, record: Record) -> bool:
        """Whether the label is an integer by itself, not written out as a text."""
        ((before, name), *rest) = self.target.parts
        value = record[name] if name and not before and not rest else None
        value = value[0] if isinstance(value, list) and value else value
        return isinstance(value, int)

    def _missing(self, name: str, fields: Sequence[str]) -> str:
        return (
            f"{self.records.missing(name, fields)}. data.prompt and data.target name the fields of"
            " an example"
        )

    def _bad(self, i: int, why: str) -> Example:
        self.records.bad(i, why)
        return SKIPPED


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# Keys of a message that say what neither its content nor a plain chat template does, or how much of
# it is to be learned; all others are about it (a date, its model).
_MORE = (
    "tool_calls", "tool_call_id", "function_call", "tools", "functions", "reasoning",
    "reasoning_content", "thinking", "refusal", "audio", "images", "documents", "weight",
)  # fmt: skip
_NOTHING = (None, "", [], {})


def _messages(value: Any, name: str) -> tuple[dict[str, str], ...]:
    """The messages in a field, up to the last one that the assistant says.

    Raises:
      ValueError: it holds something else, or nothing of the assistant's.
    """
    if not isinstance(value, list):
        raise ValueError(f"'{name}' must be a list of messages, not {kind(value)}")
    found = []
    for n, message in enumerate(value, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"'{name}': message {n} is no object with 'role' and 'content'")
        for key in _MORE:
            if message.get(key) not in _NOTHING and (key, message[key]) != ("weight", 1):
                raise ValueError(
                    f"'{name}': message {n} has '{key}', which would be lost: a message is learned"
                    " by its 'role', 'content' and 'name'"
                )
        texts = {"role": message["role"], "content": message["content"]}
        if message.get("name") not in _NOTHING:
            texts["name"] = message["name"]
        found.append({key: _text(texts, key) for key in texts})
        if found[1:] and found[-1]["role"] == "assistant" and not found[-1]["content"].strip():
            raise ValueError(f"'{name}': message {n}, the assistant's, is empty")
    while found and found[-1]["role"] != "assistant":
        found.pop()
    if not found:
        raise ValueError(f"'{name}' has no message of the role 'assistant'")
    if len(found) == 1:
        raise ValueError(f"'{name}': the assistant speaks first, and says nothing after that")
    return tuple(found)


def _text(record: Record, name: str) -> str:
    """A field as text.

    Raises:
      KeyError: it is not there.
      ValueError: it is no text and no finite number.
    """
    value: Any = record[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"'{name}' must be text or a number, not {kind(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"'{name}' must be text or a number, not {value}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"'{name}' holds half of a surrogate pair") from None
    return text
