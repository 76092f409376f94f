"""OpenAI's interface: requests checked field by field, and the shape of errors.

Source: https://platform.openai.com/docs/api-reference/completions and /chat. A field that would
change the result and is not supported is refused by name; what only labels a request is ignored.
"""

import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from lm_jax import json_text
from lm_jax.errors import UserError
from lm_jax.generation.sampling import Sampling

_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_ROLES = ("system", "developer", "user", "assistant")
_MOST_STOPS = 4
_MOST_SHOWN = 1000  # characters of what an error says, which may quote the request
_PENALTIES = (0.01, 100.0)  # of repetition; beyond, scores may not be finite


class ApiError(Exception):
    """What a client did wrong, or what came of its request.

    Attributes:
      status: of HTTP.
      param: the field that it is about.
      code: a word for programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kinds = {429: "rate_limit_error", 503: "service_unavailable_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self)[:_MOST_SHOWN],
                "type": kinds.get(self.status, kind),
                "param": self.param and self.param[:_MOST_SHOWN],
                "code": self.code,
            }
        }


@dataclasses.dataclass(frozen=True)
class Request:
    """A request that can be carried out.

    Attributes:
      prompts: texts to continue, or the ids of their tokens; of a chat, none.
      messages: of a chat.
      seeds: one for each prompt.
    """

    chat: bool
    prompts: tuple[str | tuple[int, ...], ...]
    messages: tuple[dict[str, str], ...]
    max_tokens: int
    sampling: Sampling
    seeds: tuple[int, ...]
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def parse(body: bytes, *, chat: bool, model: str, max_tokens: int) -> Request:
    """Checks a request's body.

    Args:
      model: the name that is served.
      max_tokens: the most that may be asked for.

    Raises:
      ApiError: 400, or 404 for another model; the message names the field.
    """
    fields = _Fields(_json(body))
    if (asked := fields.text("model")) is not None:
        check_model(asked, model)
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[dict[str, str], ...] = ()
    if chat:
        messages = _messages(fields.take("messages"))
    else:
        prompts = _prompts(fields.take("prompt"))
    default = max_tokens if chat else min(16, max_tokens)
    most = fields.integer("max_tokens", default, 1, max_tokens)
    if chat:
        most = fields.integer("max_completion_tokens", most, 1, max_tokens)
    stop = fields.take("stop")
    stops = () if stop in (None, []) else _strings(stop, "stop", "a string or a list of strings")
    if len(stops) > _MOST_STOPS or "" in stops:
        raise ApiError(400, f"stop: up to {_MOST_STOPS} strings that are not empty", "stop")
    seed = fields.integer("seed", None, 0, 2**32 - 1)
    count = 1 if chat else len(prompts)
    request = Request(
        chat=chat,
        prompts=prompts,
        messages=messages,
        max_tokens=most,
        sampling=_sampling(fields),
        seeds=tuple(secrets.randbits(32) if seed is None else seed for _ in range(count)),
        stop=stops,
        stream=fields.boolean("stream"),
        include_usage=_include_usage(fields),
    )
    _refuse(fields, chat)
    return request


def check_model(asked: str, model: str) -> None:
    """
    Raises:
      ApiError: 404, it is not the one that is served.
    """
    if asked != model:
        message = f"there is no model '{asked[:200]}' here; this server has '{model}'"
        raise ApiError(404, message, "model", "model_not_found")


def _json(body: bytes) -> dict[str, Any]:
    try:
        found = json_text.loads(body, finite=True)
    except json_text.JsonError as e:
        raise ApiError(400, f"the body is not JSON: {e}") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body must be a JSON object")
    return found


class _Fields:
    """A request's fields, each of which is taken once; null is as good as absent."""

    def __init__(self, fields: Mapping[str, Any]):
        self.left = {name: value for name, value in fields.items() if value is not None}

    def take(self, name: str) -> Any:
        return self.left.pop(name, None)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise _wrong(name, "a string", value)
        return value

    def boolean(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise _wrong(name, "true or false", value)
        return bool(value)

    def integer(self, name: str, default: int | None, least: int, most: int) -> int | None:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise _wrong(name, f"an integer from {least} to {most}", value)
        return value

    def number(self, name: str, default: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        try:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError
            return float(value)
        except (TypeError, OverflowError):
            raise _wrong(name, "a number", value) from None


def _wrong(name: str, wanted: str, value: Any) -> ApiError:
    shown = json.dumps(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ApiError(400, f"{name}: must be {wanted}, not {shown}", name)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Texts, or token ids."""
    wanted = "a string, a list of strings, a list of token ids, or a list of such lists"

    def ids(part: Any) -> bool:
        return (
            isinstance(part, list)
            and len(part) > 0
            and all(type(i) is int and 0 <= i < 2**31 for i in part)
        )

    if ids(value):
        return (tuple(value),)
    if isinstance(value, list) and value and all(map(ids, value)):
        return tuple(map(tuple, value))
    return _strings(value, "prompt", wanted)


def _strings(value: Any, name: str, wanted: str) -> tuple[str, ...]:
    several = [value] if isinstance(value, str) else value
    right = isinstance(several, list) and several and all(isinstance(s, str) for s in several)
    if value is None:
        raise ApiError(400, f"{name}: is missing: {wanted}", name)
    if not right:
        raise _wrong(name, wanted, value)
    return tuple(several)


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages: must be a list of at least one message", "messages")
    found = []
    for i, message in enumerate(value):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise _wrong(where, "an object", message)
        message = {key: part for key, part in message.items() if part is not None}
        if message.get("role") not in _ROLES:
            raise _wrong(f"{where}.role", f"one of {', '.join(_ROLES)}", message.get("role"))
        message["content"] = _content(message.get("content"), f"{where}.content")
        if not isinstance(message.get("name", ""), str):
            raise _wrong(f"{where}.name", "a string", message["name"])
        if unknown := sorted(message.keys() - {"role", "content", "name"}):
            raise ApiError(400, f"{where}.{unknown[0]}: is not supported", f"{where}.{unknown[0]}")
        found.append(message)
    return tuple(found)


def _content(value: Any, where: str) -> str:
    """A text, or a list of parts that are all text: a line each."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) and value else [None]
    for part in parts:
        right = isinstance(part, dict) and part.keys() == {"type", "text"}
        if not right or part["type"] != "text" or not isinstance(part["text"], str):
            raise _wrong(where, "a string, or a list of parts of the type 'text'", value)
    return "\n".join(part["text"] for part in parts)


def _sampling(fields: _Fields) -> Sampling:
    sampling = Sampling(
        temperature=fields.number("temperature", 1.0),
        top_k=fields.integer("top_k", 0, 0, 2**31 - 1),
        top_p=fields.number("top_p", 1.0),
        min_p=fields.number("min_p", 0.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0),
    )
    least, most = _PENALTIES
    if not least <= sampling.repetition_penalty <= most:
        raise _wrong("repetition_penalty", f"from {least} to {most}", sampling.repetition_penalty)
    try:
        return sampling.validate()
    except UserError as e:
        raise ApiError(400, str(e), str(e).partition(":")[0]) from None


def _include_usage(fields: _Fields) -> bool:
    options = fields.take("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise _wrong("stream_options", "an object", options)
    inner = _Fields(options)
    include = inner.boolean("include_usage")
    inner.take("include_obfuscation")
    if inner.left:
        name = f"stream_options.{min(inner.left)}"
        raise ApiError(400, f"{name}: is not supported", name)
    return include


# What a field may hold of those that are not supported: that which asks for nothing.
_NOTHING: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("n", "best_of"), lambda v: type(v) is int and v == 1),
    **dict.fromkeys(
        ("presence_penalty", "frequency_penalty"),
        lambda v: type(v) in (int, float) and v == 0,
    ),
    **dict.fromkeys(("logprobs", "echo"), lambda v: v is False),
    **dict.fromkeys(("logit_bias", "tools", "functions"), lambda v: v in ({}, [])),
    "top_logprobs": lambda v: type(v) is int and v == 0,
    "suffix": lambda v: v == "",
    "response_format": lambda v: v == {"type": "text"},
    "tool_choice": lambda v: v in ("none", "auto"),
    "function_call": lambda v: v in ("none", "auto"),
    "parallel_tool_calls": lambda v: isinstance(v, bool),
    "modalities": lambda v: v == ["text"],
}


def _refuse(fields: _Fields, chat: bool) -> None:
    for name, value in fields.left.items():
        if name in _IGNORED or (name in _NOTHING and _NOTHING[name](value)):
            continue
        if name in ("prompt", "messages"):
            other = "/v1/completions" if chat else "/v1/chat/completions"
            raise ApiError(400, f"{name}: is for {other}", name)
        if name in _NOTHING:
            raise ApiError(400, f"{name}: is not supported; leave it out", name)
        raise ApiError(400, f"{name[:60]}: there is no such field, or it is not supported", name)
