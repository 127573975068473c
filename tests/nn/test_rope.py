"""Rotary embeddings rotate the first part of a head as complex numbers rotate."""

import jax.numpy as jnp
import numpy as np
import pytest

from s3d_jax.nn.rope import rotary_table, rotate
from s3d_jax.settings.model import RopeConfig


@pytest.mark.parametrize("rotated", [20, 14, 10, 2])
def test_partial_rotary(rotated):
    """As in Phi: the leading entries of a head turn, the others are left alone."""
    head_dim, theta = 20, 500.0
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 3, head_dim)).astype(np.float32)
    positions = rng.integers(0, 300, (2, 7))
    rope = RopeConfig(theta=theta, rotary_fraction=rotated / head_dim)
    cos, sin = rotary_table(rope, head_dim, jnp.asarray(positions), jnp.zeros(2, jnp.int32))
    assert cos.shape == sin.shape == (2, 7, rotated // 2)
    ours = np.asarray(rotate(jnp.asarray(x), cos, sin))

    half = rotated // 2
    angles = positions[..., None] * theta ** (-np.arange(half) / half)
    pairs = x[..., :half] + 1j * x[..., half:rotated]  # entry i turns together with entry i + R/2
    turned = pairs * np.exp(1j * angles)[:, :, None]
    expected = np.concatenate([turned.real, turned.imag, x[..., rotated:]], axis=-1)
    np.testing.assert_allclose(ours, expected, atol=1e-4)  # float32 angles of up to 300 radians
    assert (ours[..., rotated:] == x[..., rotated:]).all()
