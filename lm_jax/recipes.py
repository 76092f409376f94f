"""What the recipes in `configs/` share: choosing a variant by its name."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from lm_jax.errors import UserError

T = TypeVar("T")


def choose(variant: str, variants: Mapping[str, T]) -> T:
    """The entry of `variants` for the ARG of `--config=FILE.py:ARG`.

    Raises:
      UserError: there is none; the message names the nearest and lists them all.
    """
    if variant in variants:
        return variants[variant]
    near = difflib.get_close_matches(variant.lower(), variants, n=1, cutoff=0.4)
    raise UserError(
        f"the recipe has no variant '{variant}'"
        + (f"; did you mean '{near[0]}'?" if near else "")
        + f" (it has {', '.join(variants)})"
    )
