"""The bytes that a published token stands for, as the decoder of `tokenizers` has it."""

import json
from collections.abc import Callable
from typing import Any


def spelling_of(decoder: Any) -> tuple[Callable[[str, bool], bytes] | None, int]:
    """Reads a `tokenizers` decoder.

    Returns (spell, prefix_bytes): `spell(token, added)` gives the bytes that a token stands for,
    wherever it stands; None where there is no such function.
    """
    if decoder is None:
        return None, 0
    spec = json.loads(decoder.__getstate__())
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level, 0
    if kinds == ["Metaspace"]:
        space = steps[0]["replacement"]
        prefix = steps[0]["prepend_scheme"] != "never"
        return lambda token, added: token.replace(space, " ").encode(), int(prefix)
    # Llama 2 and Gemma: Replace, ByteFallback, Fuse and maybe Strip, in this order.
    if not kinds or set(kinds) - {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return None, 0
    replaced, prefix_bytes, fused = [], 0, False
    for step in steps:
        if step["type"] == "Replace":
            if fused or "String" not in step["pattern"]:
                return None, 0
            replaced.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "Fuse":
            fused = True
        elif step["type"] == "Strip":
            if not fused or step["content"] != " " or step["start"] > 1 or step["stop"]:
                return None, 0
            prefix_bytes = step["start"]
    fallback = "ByteFallback" in kinds

    def spell(token: str, added: bool) -> bytes:
        if fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode()

    return spell, prefix_bytes


def _byte_level(token: str, added: bool) -> bytes:
    if added or any(c not in BYTE_CHARACTERS for c in token):
        return token.encode()
    return bytes(BYTE_CHARACTERS[c] for c in token)


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (Radford et al. 2019):
    its own where Latin-1 prints one, else the next from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printed]
    return {chr(b): b for b in printed} | {chr(0x100 + n): b for n, b in enumerate(rest)}


BYTE_CHARACTERS = _byte_characters()
