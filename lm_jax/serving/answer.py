"""OpenAI's interface: the shapes of answers, whole and streamed.

Source: https://platform.openai.com/docs/api-reference/completions and /chat.
"""

import dataclasses
import secrets
import time
from typing import Any

from lm_jax.serving.protocol import Request


@dataclasses.dataclass(frozen=True)
class Answer:
    """Makes the objects of one answer, which share an id."""

    request: Request
    model: str
    id: str
    created: int

    @classmethod
    def to(cls, request: Request, model: str) -> "Answer":
        kind = "chatcmpl" if request.chat else "cmpl"
        return cls(request, model, f"{kind}-{secrets.token_hex(12)}", int(time.time()))

    def whole(self, texts: list[str], reasons: list[str], usage: dict[str, int]) -> dict[str, Any]:
        choices = [
            self._choice(i, self._said(text), reason)
            for i, (text, reason) in enumerate(zip(texts, reasons))
        ]
        return self._object("", choices) | {"usage": usage}

    def first(self, index: int) -> dict[str, Any] | None:
        """The chunk that begins a streamed answer, if there is one."""
        if not self.request.chat:
            return None
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, index: int, text: str) -> dict[str, Any]:
        said = {"delta": {"content": text}} if self.request.chat else {"text": text}
        return self._chunk(index, said, None)

    def last(self, index: int, reason: str) -> dict[str, Any]:
        return self._chunk(index, {"delta": {}} if self.request.chat else {"text": ""}, reason)

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk at the end of a streamed answer that counts tokens."""
        return self._object(".chunk", []) | {"usage": usage}

    def _said(self, text: str) -> dict[str, Any]:
        if self.request.chat:
            return {"message": {"role": "assistant", "content": text}}
        return {"text": text}

    def _choice(self, index: int, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        reason = "stop" if reason == "eos" else reason
        return {"index": index, **said, "logprobs": None, "finish_reason": reason}

    def _chunk(self, index: int, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        more = {"usage": None} if self.request.include_usage else {}
        return self._object(".chunk", [self._choice(index, said, reason)]) | more

    def _object(self, suffix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.request.chat else "text_completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
