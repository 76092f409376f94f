"""From text and examples to tokens.

Of an example not every pair of (input, target) counts: of objective 'complete' those of its target
do, of 'chat' what the assistant says, of 'classify' one token's, whose target is its class.

P pairs of an example.
"""

import functools
from collections.abc import Sequence

import numpy as np

from lm_jax.config import DataConfig
from lm_jax.data.chat import ChatTemplate, Message, chat_template_of
from lm_jax.data.examples import Example
from lm_jax.data.tokenizer_base import Tokenizer
from lm_jax.errors import UserError


def with_ends(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """[bos] + ids + [eos] as int32; eos stands in for a missing bos, as for GPT-2."""
    front = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    back = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return np.concatenate([np.array(front, np.int32), ids, np.array(back, np.int32)])


def encode_example(
    example: Example, tokenizer: Tokenizer, config: DataConfig
) -> tuple[np.ndarray, bool]:
    """An example's (input, target, whether it counts), int32 [P, 3] with P at most `config.length`,
    and whether it is whole.

    Of a prompt that is too long the beginning is left out, since the question mostly stands at its
    end; of a target, of a conversation and of a text to classify, the end.
    """
    length = config.length
    if config.objective == "classify":
        tokens, whole = text_to_classify(example.prompt, tokenizer, length)
        if not len(tokens):
            raise UserError("a text to classify is empty, and this tokenizer has no token for that")
        pairs_P3 = np.zeros((len(tokens), 3), np.int32)
        pairs_P3[:, 0] = tokens
        pairs_P3[0 if config.label_token == "first" else -1, 1:] = example.label, 1
        return pairs_P3, whole
    if example.messages:
        tokens, counts = conversation(example.messages, tokenizer)
        whole = len(tokens) - 1 <= length
    else:
        prompt, target = prompt_ids(example, tokenizer), _target_ids(example, tokenizer)
        room = length + 1 - len(target)
        whole = len(prompt) <= room
        prompt = shortened(prompt, max(room, 1), tokenizer)
        tokens = np.concatenate([prompt, target])
        counts = np.arange(len(tokens)) >= len(prompt)
    tokens, counts = tokens[: length + 1], counts[: length + 1]
    pairs_P3 = np.stack([tokens[:-1], tokens[1:], counts[1:].astype(np.int32)], axis=1)
    return pairs_P3, whole


def with_ends_to_classify(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """As `with_ends`; of a published tokenizer it is what its post-processor says, since that is
    what published classifiers have learned from."""
    return tokenizer.frame(ids) if tokenizer.kind == "huggingface" else with_ends(tokenizer, ids)


def text_to_classify(text: str, tokenizer: Tokenizer, longest: int) -> tuple[np.ndarray, bool]:
    """A text with what goes around it, at most `longest` tokens, and whether it is the whole text.

    An empty text around which nothing goes is what begins a text.
    """
    ids, ends = tokenizer.encode(text), len(with_ends_to_classify(tokenizer, np.zeros(0, np.int32)))
    framed = with_ends_to_classify(tokenizer, ids[: longest - ends])
    if not len(framed) and tokenizer.begin_id is not None:
        framed = np.array([tokenizer.begin_id], np.int32)
    return framed, len(ids) <= longest - ends


def prompt_ids(example: Example, tokenizer: Tokenizer) -> np.ndarray:
    """The ids that an answer is generated after, the same as when it is learned.

    Raises:
      UserError: there are none, so that nothing can follow; or the chat template does not take the
        messages.
    """
    if example.messages:
        ids = _encode_messages(example.messages[:-1], tokenizer, True)
    else:
        ids = tokenizer.encode_prompt(example.prompt)
    if not len(ids):
        raise UserError(
            "an example's prompt is empty, and this tokenizer has no token that begins a text"
        )
    return ids


def shortened(prompt: np.ndarray, room: int, tokenizer: Tokenizer) -> np.ndarray:
    """`prompt` in at most `room` tokens: its end, after what begins a text."""
    if len(prompt) <= room:
        return prompt
    first = 1 if room > 1 and prompt[0] == tokenizer.begin_id else 0
    return np.concatenate([prompt[:first], prompt[len(prompt) - room + first :]])


def _target_ids(example: Example, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of the first target, encoded by itself, and eos."""
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return np.concatenate([tokenizer.encode(example.targets[0]), np.array(eos, np.int32)])


def conversation(
    messages: Sequence[Message], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a whole conversation, and which of them the assistant says, its ends included.

    Raises:
      UserError: the chat template does not take the messages, or writes a turn otherwise once
        another one follows.
    """
    ids = _encode_messages(messages, tokenizer, False)
    counts = np.zeros(len(ids), bool)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _encode_messages(messages[:i], tokenizer, True)
        through = _encode_messages(messages[: i + 1], tokenizer, False)
        same = np.array_equal(through[: len(before)], before)
        if not same or not np.array_equal(ids[: len(through)], through):
            raise UserError(
                f"the chat template writes message {i + 1} of a conversation otherwise"
                + (" when it is yet to be said" if not same else " when more follows")
                + ": what is to be learned of it cannot be told"
            )
        counts[len(before) : len(through)] = True
    return ids, counts


def _encode_messages(
    messages: Sequence[Message], tokenizer: Tokenizer, to_be_continued: bool
) -> np.ndarray:
    template = _template(tokenizer)
    if template is not None:
        return template.encode(tokenizer, messages, to_be_continued)
    # A model of our own: 'User: ...', a line each, and what the assistant says ends with eos.
    eos = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], np.int32)
    parts = [tokenizer.encode_prompt("")]
    for message in messages:
        parts.append(tokenizer.encode(f"{message['role'].capitalize()}:"))
        parts.append(tokenizer.encode(f" {message['content']}"))
        parts.append(eos if message["role"] == "assistant" else tokenizer.encode("\n"))
    if to_be_continued:
        parts.append(tokenizer.encode("Assistant:"))
    return np.concatenate(parts).astype(np.int32)


@functools.lru_cache(maxsize=4)
def _template(tokenizer: Tokenizer) -> ChatTemplate | None:
    return chat_template_of(tokenizer)
