"""Examples that are too long, made shorter where it costs least.

Of a conversation the oldest exchanges are left out, up to the last question; what the system says
stays. Then what the fields of a record hold is cut at its end, the longest first. The words of a
template around its fields and the markup of a chat template are never cut.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from lm_jax.data.examples import Example
from lm_jax.errors import UserError
from lm_jax.template import Span

_TRIES = 12  # lengths of the fields that are tried; each time the text is encoded anew
_NEAR = 64  # one such part of the tokens may stay unused
_STAYS = ("system", "developer")  # roles of messages that hold for all of a conversation


def within(
    example: Example, budget: int, encode: Callable[[Example], np.ndarray]
) -> tuple[Example, np.ndarray, bool]:
    """An example whose prompt has at most `budget` tokens, the prompt's ids, and whether anything
    was left out.

    Args:
      encode: the ids of an example's prompt.

    Raises:
      UserError: what may not be cut is too long by itself; or `encode` does.
    """
    ids = encode(example)
    if len(ids) <= budget:
        return example, ids, False
    while (rest := _without_oldest(example)) is not None:
        example, ids = rest, encode(rest)
        if len(ids) <= budget:
            return example, ids, True
    return *_cut(example, ids, budget, encode), True


def _without_oldest(example: Example) -> Example | None:
    """The conversation from its second question on; None where there is no such."""
    messages = example.messages
    stays = next((i for i, m in enumerate(messages) if m["role"] not in _STAYS), 0)
    for i in range(stays + 1, len(messages) - 1):
        if messages[i]["role"] == "user" and messages[i - 1]["role"] != "user":
            return dataclasses.replace(example, messages=(*messages[:stays], *messages[i:]))
    return None


def _cut(
    example: Example, ids: np.ndarray, budget: int, encode: Callable[[Example], np.ndarray]
) -> tuple[Example, np.ndarray]:
    """The example with the same most characters for each field, as many as fit."""
    longest = max((stop - start for start, stop in _fields(example)), default=0)
    least = _with_fields_of(example, 1)
    found = least, encode(least)
    if not longest or len(found[1]) > budget:
        raise UserError(
            f"it is too long, and cannot be shortened to {budget} tokens: so much or more is taken"
            " by what stands around its fields"
        )
    low, high, above = 1, longest, len(ids)
    for n in range(_TRIES):
        below = len(found[1])
        if high - low <= 1 or budget - below <= budget // _NEAR:
            break
        # Where tokens are as long everywhere, and half-way where that leads nowhere.
        share = (budget - below) / (above - below) if n % 2 == 0 else 0.5
        most = min(max(low + int((high - low) * share), low + 1), high - 1)
        tried = _with_fields_of(example, most)
        if len(tried_ids := encode(tried)) <= budget:
            low, found = most, (tried, tried_ids)
        else:
            high, above = most, len(tried_ids)
    return found


def _fields(example: Example) -> tuple[Span, ...]:
    """Of a conversation, each message that may be cut is a field, wherever it stands."""
    if example.fields is None and example.messages:
        return tuple((0, len(example.messages[i]["content"])) for i in _asked(example))
    return ((0, len(example.prompt)),) if example.fields is None else example.fields


def _asked(example: Example) -> list[int]:
    """Which messages may be cut."""
    kept = (*_STAYS, "assistant")
    return [i for i, m in enumerate(example.messages[:-1]) if m["role"] not in kept]


def _with_fields_of(example: Example, most: int) -> Example:
    """The example with at most `most` characters of each field, its first ones."""
    messages = list(example.messages)
    if example.fields is None and messages:
        for i in _asked(example):
            messages[i] = messages[i] | {"content": messages[i]["content"][:most]}
        return dataclasses.replace(example, messages=tuple(messages))
    prompt, fields, end = "", [], 0
    for start, stop in _fields(example):
        prompt += example.prompt[end:start]
        fields.append((len(prompt), len(prompt) + min(stop - start, most)))
        prompt, end = prompt + example.prompt[start : min(stop, start + most)], stop
    prompt += example.prompt[end:]
    if messages:
        messages[0] = messages[0] | {"content": prompt}
    return dataclasses.replace(
        example, prompt=prompt, fields=tuple(fields), messages=tuple(messages)
    )
