"""The device mesh, and the one table that says which array axis is split over which mesh axis.

Every array axis has a logical name. Mesh axes are Explicit: an array's type carries its sharding,
so that a forgotten one is an error when a step is traced and not a slow run. Outside of any mesh
the functions here do nothing, and the model runs on one device.
"""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lm_jax.config import MeshConfig
from lm_jax.errors import UserError

# From the slowest network to the fastest: the last axis joins devices that are wired together.
AXES = ("data", "fsdp", "expert", "sequence", "tensor")
Axes = str | tuple[str, ...] | None

# Logical axis of a parameter -> mesh axes.
PARAMETER_RULES: dict[str, Axes] = {
    "layers": None,
    "vocab": "tensor",
    "embed": ("fsdp", "expert", "sequence"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "expert_embed": ("fsdp", "sequence"),
    "head_width": None,
    "rank": None,
    "features": None,
    "position": None,
    "norm": None,  # scales and biases as wide as the model: too small to share out
}
# Logical axis of an activation -> mesh axes. A parameter in use is an activation too: its fsdp
# parts are gathered, its tensor parts stay where they are.
ACTIVATION_RULES: dict[str, Axes] = PARAMETER_RULES | {
    "batch": ("data", "fsdp", "expert"),
    "length": "sequence",
    "residual": ("sequence", "tensor"),  # the length, between the products that split heads
    "embed": None,
    "expert_embed": None,
}
BATCH_AXES = ACTIVATION_RULES["batch"]


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (all of the job's by default).

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    given = math.prod(n for n in sizes.values() if n != -1)
    if -1 in sizes.values() and len(devices) % given == 0:
        sizes = {k: len(devices) // given if n == -1 else n for k, n in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        asked = " x ".join(f"{k} {getattr(config, k)}" for k in AXES)
        free = [k for k in AXES if getattr(config, k) == -1]
        advice = (
            f"the others make {given}, which does not divide {len(devices)}: change mesh.*"
            if free
            else "change mesh.*, or set one axis to -1 to take what is left"
        )
        raise UserError(f"mesh: {asked} does not fit {len(devices)} device(s): {advice}")
    # Of GPUs, each node counts as a slice: there, any axis may cross the network.
    tpus = devices[0].platform == "tpu"
    shape, slices = (
        tuple(sizes.values()),
        {getattr(d, "slice_index", 0) if tpus else 0 for d in devices},
    )
    types = (AxisType.Explicit,) * len(AXES)
    if len(slices) == 1:
        flat = functools.partial(mesh_utils.create_device_mesh, shape, devices)
        return Mesh(_arranged(flat), AXES, axis_types=types)
    if sizes["data"] % len(slices):
        raise UserError(
            f"mesh.data = {sizes['data']} is not a multiple of the {len(slices)} slices: between"
            " slices the network is slow, and only the gradients of whole copies should cross it"
        )
    across = (len(slices), *(1,) * (len(AXES) - 1))
    within = (sizes["data"] // len(slices), *shape[1:])
    hybrid = functools.partial(mesh_utils.create_hybrid_device_mesh, within, across, devices)
    return Mesh(_arranged(hybrid), AXES, axis_types=types)


def _arranged(arrange: Callable[..., np.ndarray]) -> np.ndarray:
    """Neighbours on the wires as neighbours along the axes, as far as the shapes let them."""
    try:
        return arrange()
    except NotImplementedError:  # an axis would need a part of one of the torus
        return arrange(allow_split_physical_axes=True)


def batch_shards(mesh: Mesh) -> int:
    """Parts that the batch is split in."""
    return _size(mesh, BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `BATCH_AXES`, all else whole."""
    return NamedSharding(mesh, _spec(ACTIVATION_RULES, ("batch",), mesh))


def batch_block(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Which part of each batch a process reads, and of how many equal ones: (index, count).

    Processes whose devices hold the same rows, because an axis that does not split rows joins their
    hosts, read the same part. The devices of a process need not be neighbours along the batch axes;
    the parts are numbered by the first shard of each.

    Args:
      process: its index; None: this one.

    Raises:
      UserError: the rows of two processes overlap and are not the same, or differ in number.
    """
    axes = [AXES.index(axis) for axis in BATCH_AXES]
    first = np.moveaxis(mesh.devices, axes, range(len(axes)))
    shards: dict[int, set[int]] = {}  # of each process
    for shard, devices in enumerate(first.reshape(batch_shards(mesh), -1)):
        for device in devices:
            shards.setdefault(device.process_index, set()).add(shard)
    parts = sorted({tuple(sorted(found)) for found in shards.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != batch_shards(mesh):
        asked = " x ".join(f"mesh.{axis} {n}" for axis, n in mesh.shape.items() if n > 1)
        raise UserError(
            f"{asked}: on the {len(shards)} processes of this job, some would share a part of their"
            " rows with others: let mesh.tensor x mesh.sequence divide the devices of a host, or"
            " be a multiple of them"
        )
    mine = tuple(sorted(shards[jax.process_index() if process is None else process]))
    return parts.index(mine), len(parts)


def to_devices(local, mesh: Mesh):
    """A dict of this process's rows as global arrays [B, ...]; a lone array as it is everywhere.

    Args:
      local: rows as `batch_block` says: the n-th of them go where this process's n-th shard is.
    """
    if not isinstance(local, dict):
        return jax.device_put(local, NamedSharding(mesh, P()))
    sharding, n = batch_sharding(mesh), batch_block(mesh)[1]

    def whole(rows: np.ndarray) -> jax.Array:
        # The whole shape is said: jax cannot tell it of processes that share rows.
        shape = (rows.shape[0] * n, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    with jax.transfer_guard("allow"):
        return {key: whole(rows) for key, rows in local.items()}


def activation_spec(*axes: str | None) -> P | None:
    """The sharding of an activation with these logical axes; None outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else _spec(ACTIVATION_RULES, axes, mesh)


def parameter_spec(*axes: str) -> P | None:
    """The sharding of a parameter, a gradient or an optimizer's moment; None outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else _spec(PARAMETER_RULES, axes, mesh)


def _spec(rules: dict[str, Axes], axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh) -> P:
    """Mesh axes of one device split nothing, and are left out."""
    return P(*(_names(rules[a] if a else None, mesh) or None for a in axes))


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': of the mesh that is set, or else of jax's own devices."""
    mesh = jax.sharding.get_abstract_mesh()
    name = jax.default_backend() if mesh.empty else mesh.abstract_device.platform
    return "gpu" if name == "cuda" else name


def shards(axis: str | None) -> int:
    """Parts that an activation's logical axis is split in; 1 outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or axis is None else _size(mesh, ACTIVATION_RULES[axis])


def axis_size(*names: str) -> int:
    """Devices along these mesh axes together."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)


def dividing(axis: str, size: int) -> str | None:
    """`axis` if the mesh divides an array axis of this size, else None, which leaves it whole."""
    return None if size % shards(axis) else axis


def reshard(x: jax.Array, wanted: P | None) -> jax.Array:
    """`x` with another sharding; a parameter that a layer uses is gathered by this."""
    return x if wanted is None else jax.sharding.reshard(x, wanted)


def names_in(spec: P | Axes) -> tuple[str, ...]:
    """The mesh axes of a sharding, or of one of its parts, in order."""
    if isinstance(spec, str):
        return (spec,)
    parts = spec.partitions if isinstance(spec, P) else spec or ()
    return tuple(name for part in parts for name in names_in(part))


def check_parameters(
    shapes: dict[str, tuple[int, ...]], axes: dict[str, tuple[str, ...]], mesh: Mesh
) -> None:
    """Checks that a rule covers each axis of each parameter and that the mesh divides it.

    Args:
      shapes, axes: dotted name -> shape, and -> logical axes.

    Raises:
      UserError: a mesh axis does not divide an array axis; the message names each such parameter.
      ValueError: an axis has no rule, or a parameter not one name an axis.
    """
    wrong: list[str] = []
    sizes: dict[str, list[int]] = {}  # of the array axes that each mesh axis divides
    for name, shape in shapes.items():
        if len(axes[name]) != len(shape) or any(a not in PARAMETER_RULES for a in axes[name]):
            raise ValueError(f"{name}: axes {axes[name]} of {shape} are not covered by the rules")
        for size, axis in zip(shape, axes[name]):
            over = _names(PARAMETER_RULES[axis], mesh)
            for mesh_axis in over:
                sizes.setdefault(mesh_axis, []).append(size)
            if size % _size(mesh, over):
                keys = " x ".join(f"mesh.{a}" for a in over)
                wrong.append(
                    f"{name}: {keys} = {_size(mesh, over)} does not divide its '{axis}' axis of"
                    f" {size}"
                )
    if wrong:
        possible = " and ".join(
            f"mesh.{axis} can be {_divisors(math.gcd(mesh.size, *found))}"
            for axis, found in sizes.items()
        )
        raise UserError(
            "the model does not fit the mesh:\n  "
            + "\n  ".join(wrong)
            + f"\nwith this model and {mesh.size} devices, {possible}: change mesh.* (a model that"
            " comes with its weights stays as it is)"
        )


def _names(axes: Axes, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Those of `axes` that split anything."""
    return tuple(axis for axis in names_in(axes) if mesh.shape[axis] > 1)


def _size(mesh: Mesh | AbstractMesh, axes: Axes) -> int:
    return math.prod(mesh.shape[axis] for axis in _names(axes, mesh))


def _divisors(n: int) -> str:
    *most, last = [str(d) for d in range(1, n + 1) if n % d == 0]
    return f"{', '.join(most)} or {last}" if most else last
