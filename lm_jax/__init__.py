"""Train and apply language models with JAX and Flax, TPU first."""

__version__ = "0.1.0"
