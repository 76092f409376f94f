"""From text and examples to tokens.

Of an example not every pair of (input, target) counts: of objective 'complete' those of its target
do, of 'chat' what the assistant says, of 'classify' one token's, whose target is its class.

P pairs of an example.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from lm_jax.config import DataConfig
from lm_jax.data.chat import DAY_OF_EXAMPLES, ChatTemplate, Message, chat_template_for
from lm_jax.data.examples import Example
from lm_jax.data.shortening import within
from lm_jax.data.tokenizer_base import Tokenizer
from lm_jax.errors import UserError

_NOTHING = np.zeros(0, np.int32)


def with_ends(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """[bos] + ids + [eos] as int32; eos stands in for a missing bos, as for GPT-2."""
    front = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    back = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return np.concatenate([np.array(front, np.int32), ids, np.array(back, np.int32)])


def encode_example(
    example: Example, tokenizer: Tokenizer, config: DataConfig
) -> tuple[np.ndarray, bool]:
    """An example's (input, target, whether it counts), int32 [P, 3] with P at most `config.length`,
    and whether it is whole. Of a conversation, with `config.turns` 'together', every answer counts;
    else the last, and the others are for examples of their own (`by_turn`).

    A prompt that is too long is shortened (`lm_jax.data.shortening`) to what its target leaves, or
    to half of the row if that is more; what is too long then is the target, which loses its end.

    Raises:
      UserError: it cannot be shortened, or be learned from.
    """
    length = config.length
    if config.objective == "classify":
        tokens, whole = text_to_classify(example, tokenizer, length)
        if not len(tokens):
            raise UserError("a text to classify is empty, and this tokenizer has no token for that")
        pairs_P3 = np.zeros((len(tokens), 3), np.int32)
        pairs_P3[:, 0] = tokens
        pairs_P3[-1 if config.pooling == "last" else 0, 1:] = example.label, 1
        return pairs_P3, whole
    target = _target_ids(example, tokenizer)
    room = max(length + 1 - len(target), (length + 1) // 2)
    example, prompt, cut = _shortened(example, tokenizer, room)
    if config.turns == "together":
        tokens, counts = conversation(example.messages, tokenizer)
    else:
        tokens = np.concatenate([prompt, _target_ids(example, tokenizer) if cut else target])
        counts = np.arange(len(tokens)) >= len(prompt)
    whole = not cut and len(tokens) <= length + 1
    tokens, counts = tokens[: length + 1], counts[: length + 1]
    if not counts.any():
        raise UserError("its target has no token, so that there is nothing to learn")
    return np.stack([tokens[:-1], tokens[1:], counts[1:].astype(np.int32)], axis=1), whole


def by_turn(example: Example) -> list[Example]:
    """A conversation for each answer in it, up to that answer. What the assistant says before
    anybody else does is none."""
    messages = example.messages
    return [
        dataclasses.replace(example, targets=(m["content"],), messages=messages[: i + 1])
        for i, m in enumerate(messages)
        if m["role"] == "assistant" and i > 0
    ]


def with_ends_to_classify(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """As `with_ends`; of a published tokenizer it is what its post-processor says, since that is
    what published classifiers have learned from."""
    return tokenizer.frame(ids) if tokenizer.kind == "huggingface" else with_ends(tokenizer, ids)


def text_to_classify(
    example: Example, tokenizer: Tokenizer, longest: int
) -> tuple[np.ndarray, bool]:
    """An example's prompt with what goes around it, at most `longest` tokens, and whether it is the
    whole text. Of one that is too long, the field of a record is cut at its end.

    An empty text around which nothing goes is what begins a text.

    Raises:
      UserError: it cannot be shortened.
    """
    ids, ends = tokenizer.encode(example.prompt), len(with_ends_to_classify(tokenizer, _NOTHING))
    whole = len(ids) <= longest - ends
    if not whole and example.fields not in (None, ((0, len(example.prompt)),)):
        _, ids, _ = within(example, longest - ends, lambda e: tokenizer.encode(e.prompt))
    framed = with_ends_to_classify(tokenizer, ids[: longest - ends])
    if not len(framed) and tokenizer.begin_id is not None:
        framed = np.array([tokenizer.begin_id], np.int32)
    return framed, whole


def prompt_within(example: Example, tokenizer: Tokenizer, budget: int) -> tuple[np.ndarray, bool]:
    """The ids that an answer is generated after, the same as when it is learned, at most `budget`
    of them, and whether anything was left out, see `lm_jax.data.shortening`.

    Raises:
      UserError: it cannot be shortened so far; there are none, so that nothing can follow; or the
        chat template does not take the messages.
    """
    _, ids, cut = _shortened(example, tokenizer, budget)
    return ids, cut


def _shortened(
    example: Example, tokenizer: Tokenizer, budget: int
) -> tuple[Example, np.ndarray, bool]:
    return within(example, budget, lambda e: _prompt_ids(e, tokenizer))


def _prompt_ids(example: Example, tokenizer: Tokenizer) -> np.ndarray:
    if example.messages:
        ids = _encode_messages(example.messages[:-1], tokenizer, True)
    else:
        ids = tokenizer.encode_prompt(example.prompt)
    if not len(ids):
        raise UserError(
            "an example's prompt is empty, and this tokenizer has no token that begins a text"
        )
    return ids


def _target_ids(example: Example, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of the first target, encoded by itself, and eos; of a conversation what follows its
    prompt in the chat template."""
    if example.messages:
        return _answer(example.messages, tokenizer)[1]
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return np.concatenate([tokenizer.encode(example.targets[0]), np.array(eos, np.int32)])


def conversation(
    messages: Sequence[Message], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a whole conversation, and which of them the assistant says after another, the ends
    of what it says included.

    Raises:
      UserError: the chat template does not take the messages, would read one of them as more than
        text, or writes a turn otherwise once another one follows.
    """
    ids = _encode_messages(messages, tokenizer, False)
    counts = np.zeros(len(ids), bool)
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:
            continue
        before, said = _answer(messages[: i + 1], tokenizer)
        through = np.concatenate([before, said])
        if not np.array_equal(ids[: len(through)], through):
            raise UserError(
                f"the chat template writes message {i + 1} of a conversation otherwise when more"
                " follows: set data.turns='apart', to have each answer learned by itself"
            )
        counts[len(before) : len(through)] = True
    return ids, counts


def _answer(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The ids up to the last message, the assistant's, and those of it.

    Raises:
      UserError: the chat template does not take the messages, or writes the last of them otherwise
        than one that is to be said.
    """
    before = _encode_messages(messages[:-1], tokenizer, True)
    through = _encode_messages(messages, tokenizer, False)
    if not np.array_equal(through[: len(before)], before):
        raise UserError(
            f"the chat template writes message {len(messages)} of a conversation otherwise when it"
            " is yet to be said: what is to be learned of it cannot be told"
        )
    return before, through[len(before) :]


def _encode_messages(
    messages: Sequence[Message], tokenizer: Tokenizer, to_be_continued: bool
) -> np.ndarray:
    template = _template(tokenizer)
    template.check_literal(tokenizer, messages)
    return template.encode(tokenizer, messages, to_be_continued, DAY_OF_EXAMPLES)


@functools.lru_cache(maxsize=4)
def _template(tokenizer: Tokenizer) -> ChatTemplate:
    return chat_template_for(tokenizer, "chat")
