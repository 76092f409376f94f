"""The device mesh, and the one table that says which array axis is split over which mesh axis.

Every array axis has a logical name. Mesh axes are Explicit: an array's type carries its sharding,
so that a forgotten one is an error when a step is traced and not a slow run. Outside of any mesh
the functions here do nothing, and the model runs on one device.
"""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lm_jax.config import MeshConfig
from lm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter -> mesh axis.
PARAMETER_RULES: dict[str, str | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_width": None,
    "rank": None,
    "features": None,
    "position": None,
    "norm": None,  # scales and biases as wide as the model: too small to share out
}
# Logical axis of an activation -> mesh axes. A parameter in use is an activation too: its fsdp
# parts are gathered, its tensor parts stay where they are.
ACTIVATION_RULES: dict[str, str | tuple[str, ...] | None] = PARAMETER_RULES | {
    "batch": ("data", "fsdp"),
    "length": None,
    "embed": None,
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (all of the job's by default).

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    given = int(np.prod([n for n in sizes.values() if n != -1]))
    if -1 in sizes.values() and len(devices) % given == 0:
        sizes = {k: len(devices) // given if n == -1 else n for k, n in sizes.items()}
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise UserError(
            f"mesh: data {config.data} x fsdp {config.fsdp} x tensor {config.tensor} does not fit"
            f" {len(devices)} device(s): change mesh.*, or set one axis to -1 to take what is left"
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices
    )


def batch_shards(mesh: Mesh) -> int:
    """Parts that the batch is split in."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`, all else whole."""
    return NamedSharding(mesh, P(ACTIVATION_RULES["batch"]))


def to_devices(local, mesh: Mesh):
    """A dict of this process's rows as global arrays [B, ...]; a lone array as it is everywhere."""
    if not isinstance(local, dict):
        return jax.device_put(local, NamedSharding(mesh, P()))
    sharding, n = batch_sharding(mesh), jax.process_count()

    def whole(rows: np.ndarray) -> jax.Array:
        # The whole shape is said, or processes that share rows would each be taken for all of them.
        shape = (rows.shape[0] * n, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    with jax.transfer_guard("allow"):
        return {key: whole(rows) for key, rows in local.items()}


def activation_spec(*axes: str | None) -> P | None:
    """The sharding of an activation with these logical axes; None outside of a mesh."""
    return _spec(ACTIVATION_RULES, axes)


def parameter_spec(*axes: str) -> P | None:
    """The sharding of a parameter, a gradient or an optimizer's moment; None outside of a mesh."""
    return _spec(PARAMETER_RULES, axes)


def _spec(rules: dict, axes: tuple[str | None, ...]) -> P | None:
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return P(*(rules[a] if a else None for a in axes))


def reshard(x: jax.Array, wanted: P | None) -> jax.Array:
    """`x` with another sharding; a parameter that a layer uses is gathered by this."""
    return x if wanted is None else jax.sharding.reshard(x, wanted)


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
            mesh_axis = PARAMETER_RULES[axis]
            if mesh_axis is None:
                continue
            sizes.setdefault(mesh_axis, []).append(size)
            if size % mesh.shape[mesh_axis]:
                wrong.append(
                    f"{name}: mesh.{mesh_axis} = {mesh.shape[mesh_axis]} does not divide its"
                    f" '{axis}' axis of {size}"
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


def _divisors(n: int) -> str:
    *most, last = [str(d) for d in range(1, n + 1) if n % d == 0]
    return f"{', '.join(most)} or {last}" if most else last
