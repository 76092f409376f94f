"""Options for the compiler of a platform: each with what it does there."""

from jax.sharding import Mesh

# Accepted is not effective: each of these was seen to change the compiled step.
# On v5p, v6e and later, collectives run beside the matrix units only when SparseCores carry them;
# without, each all-gather and reduce-scatter of a layer stands between two products.
_SPARSE_CORES = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
}
_OPTIONS: dict[str, dict[str, str]] = {
    # On a torus of three dimensions, gathers over two or three of them at once.
    "TPU v5": _SPARSE_CORES
    | {
        "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
        "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
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
