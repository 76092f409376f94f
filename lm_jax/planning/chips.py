"""Accelerators as data: what fits, how fast they compute, how fast they talk."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as jax sees it.

    TPU figures are those of Google's documentation ("System architecture" of each version at
    docs.cloud.google.com/tpu/docs), which gives interconnects in both directions together; here is
    what one device can send. `flops_per_cycle` is of the matrix units by the compiler's own cycles:
    a large product of 16384^3 is estimated at 78 to 94% of it on each kind, and peak / that is the
    clock.
    """

    name: str
    kind: str  # jax's device_kind
    hbm_gib: float  # what the compiler lets a program have (libtpu 0.0.52)
    hbm_bandwidth: float  # bytes/s
    links: float  # bytes/s that a device sends over the links of one torus dimension, or in a node
    dimensions: int  # of the torus
    network: float  # bytes/s that a device sends to other slices or nodes
    flops_per_cycle: int | None = None  # bf16; None: the compiler estimates no cycles
    full: int = 0  # chips along a dimension from which on the torus is closed; 0: there is none
    cores: int = 1  # devices of a chip


CHIPS = {
    # The network of a v4 and a tpu7x host is shared by its 4 chips.
    "v4": Chip("v4", "TPU v4", 30.75, 1.228e12, 100e9, 3, 6.25e9, 2**18, 4),
    "v5e": Chip("v5e", "TPU v5 lite", 15.75, 0.819e12, 100e9, 2, 3.125e9, 2**17, 16),
    "v5p": Chip("v5p", "TPU v5", 95.73, 2.765e12, 200e9, 3, 6.25e9, 2**18, 4),
    "v6e": Chip("v6e", "TPU v6 lite", 31.24, 1.638e12, 200e9, 2, 12.5e9, 2**19, 16),
    "tpu7x": Chip("tpu7x", "TPU7x", 94.74, 3.69e12, 100e9, 3, 6.25e9, 2**19, 4, cores=2),
    # NVIDIA's data sheet: 80 GB at 3.35 TB/s, NVLink 900 GB/s in both directions; a DGX H100 has a
    # network card of 400 Gb/s for each. Of the 79.1 GiB that are there jax takes three quarters,
    # unless XLA_PYTHON_CLIENT_MEM_FRACTION says more.
    "h100": Chip("h100", "NVIDIA H100 80GB HBM3", 59.3, 3.35e12, 450e9, 1, 50e9),
}
