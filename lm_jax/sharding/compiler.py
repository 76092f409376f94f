"""Options for the compiler of a platform: each with what it does there."""

from jax.sharding import Mesh

_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
# Accepted is not effective: each was left out in turn, and the step of Llama 3 8B (fsdp 16 or 64,
# data 4; v5p:4x4x4 and v6e:16x16) compiled without it, by libtpu 0.0.52. Collectives run beside the
# matrix units only when SparseCores carry them: without the option, all of its kind (58 gathers and
# 29 scatters in four layers) stand between two products.
_SPARSE_CORES = {
    f"{_OFFLOAD}all_gather": "true",
    # On v5p it takes a gigabyte more; on v6e nothing.
    f"{_OFFLOAD}reduce_scatter": "true",
    # Of gradients, over `data`.
    f"{_OFFLOAD}all_reduce": "true",
}
_OPTIONS: dict[str, dict[str, str]] = {
    "TPU v5": _SPARSE_CORES  # v5p, a torus of three dimensions
    | {
        f"{_OFFLOAD}2d_all_gather": "true",  # as all_gather, where fsdp lies along two of them
        f"{_OFFLOAD}3d_all_gather": "true",  # and along three
    },
    "TPU v6 lite": _SPARSE_CORES,
    "TPU v6e": _SPARSE_CORES,
}


def compiler_options(device_kind: str) -> dict[str, str]:
    """Options for a program of several devices of this kind (jax's `device_kind`); {} where the
    defaults do as well: on CPUs, GPUs, and v5e, whose all-gathers are fused with products."""
    return dict(_OPTIONS.get(device_kind, {}))


def options_of(mesh: Mesh) -> dict[str, str]:
    """`compiler_options` of a mesh's devices; one device alone needs none."""
    return compiler_options(mesh.devices.flat[0].device_kind) if mesh.size > 1 else {}
