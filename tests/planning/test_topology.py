"""Names of slices, what is closed to a ring, and the numbers of a chip."""

import importlib.util

import pytest

from lm_jax.errors import UserError
from lm_jax.model.flops import peak_flops
from lm_jax.planning.chips import CHIPS
from lm_jax.planning.topology import devices_of, parse_topology


@pytest.mark.parametrize(
    ("text", "slices", "devices", "wraps"),
    [
        ("v5e:2x2", 1, 4, (False, False)),
        ("v5e:4x16", 1, 64, (False, True)),
        ("v6e:16x16", 2, 512, (True, True)),
        ("v5p:2x2x1", 1, 4, (False,) * 3),
        ("v5p:4x4x4", 2, 128, (True,) * 3),
        ("V4:2x2x4", 1, 16, (False,) * 3),
        ("tpu7x:4x4x4", 1, 128, (True,) * 3),
        ("h100:8", 1, 8, (False, False)),
        ("h100:8x4", 1, 32, (False, False)),
    ],
)
def test_names_of_topologies(text, slices, devices, wraps):
    topology = parse_topology(text, slices)
    assert (topology.devices, topology.wraps) == (devices, wraps)


@pytest.mark.parametrize(
    ("text", "slices", "said"),
    [
        ("v5x:2x2", 1, "did you mean 'v5"),
        ("a100:8", 1, "did you mean 'h100:8'"),
        ("v5e", 1, "not of the form"),
        ("v5e:2xx2", 1, "not of the form"),
        ("v5e:0x2", 1, "not of the form"),
        ("v5e:3x3", 1, "did you mean 'v5e:2x4'"),
        ("v5e:4x4x4", 1, "did you mean 'v5e:8x8'"),
        ("v5p:8x8", 1, "did you mean 'v5p:4x4x4'"),
        ("v6e:64x64", 1, "did you mean 'v6e:16x16'"),
        ("v5e:2x2", 0, "--slices: must be at least 1"),
        ("h100:16", 1, "h100:8x4"),
        ("h100:8", 2, "is of TPUs"),
        ("v5litepod-16", 1, "counts chips; .* did you mean 'v5e:4x4'"),
        ("v5litepod-1", 1, "did you mean 'v5e:1x1'"),
        ("v5e-4", 1, "did you mean 'v5e:2x2'"),
        ("V6e-64", 1, "did you mean 'v6e:8x8'"),
        ("v5p-128", 1, "counts cores, two a chip; .* did you mean 'v5p:4x4x4'"),
        ("v4-8", 1, "did you mean 'v4:2x2x1'"),
        ("tpu7x-64", 1, "did you mean 'tpu7x:2x4x4'"),
        ("v6e-0", 1, "did you mean 'v6e:"),
    ],
)
def test_what_is_no_topology(text, slices, said):
    with pytest.raises(UserError, match=said):
        parse_topology(text, slices)


@pytest.mark.parametrize(("text", "extra"), [("v5e:2x2", "plan"), ("h100:8", "cuda")])
def test_what_is_not_installed_is_named(text, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install 'lm_jax\[{extra}\]'"):
        devices_of(parse_topology(text))


def test_each_chip_has_a_peak_and_a_plausible_clock():
    for chip in CHIPS.values():
        peak = peak_flops(chip.kind)
        assert peak > 1e14
        if chip.flops_per_cycle:
            assert 0.9e9 < peak / chip.flops_per_cycle < 2.5e9, chip.name
