"""A tiny model to serve."""

import dataclasses

import tiny_generation

LLAMA = dataclasses.replace(tiny_generation.LLAMA, max_length=160)
