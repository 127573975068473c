"""Where the largest numbers of long rows are.

By the largest of each group first. XLA's CPU argmax looks at one number after the other, and its
top_k may sort the whole row within a larger program (docs/log).
"""

import jax
import jax.numpy as jnp

from s3d_jax.mesh import DATA, MODEL, axis_size, constrained

_GROUP, _SMALL_GROUP = 128, 16  # numbers


def largest(x: jax.Array) -> jax.Array:
    """Where the largest number is: `argmax` over the last axis, the first of equal ones.

    Args:
        x: float [..., V].

    Returns:
        int32 [...]; some place where there are NaN.
    """
    if (shares := axis_size(MODEL)) > 1 and x.shape[-1] % shares == 0:
        # Of each device's share first, so that few numbers are sent.
        axes = (DATA, *[None] * x.ndim)[: x.ndim - 1]
        parts = constrained(x.reshape(*x.shape[:-1], shares, -1), *axes, MODEL)
        here = _largest(parts)
        best = jnp.take_along_axis(parts, here[..., None], axis=-1)[..., 0]
        share = jnp.argmax(best, axis=-1, keepdims=True)
        found = share * parts.shape[-1] + jnp.take_along_axis(here, share, axis=-1)
        return found[..., 0].astype(jnp.int32)
    return _largest(x)


def _largest(x: jax.Array) -> jax.Array:
    if x.shape[-1] <= _GROUP:
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    groups = _in_groups(x)
    group = jnp.argmax(jnp.max(groups, axis=-1), axis=-1)
    best = jnp.take_along_axis(groups, group[..., None, None], axis=-2)[..., 0, :]
    return (group * _GROUP + jnp.argmax(best, axis=-1)).astype(jnp.int32)


def largest_few(x: jax.Array, count: int) -> jax.Array:
    """Where the largest numbers are, in falling order, the first of equal ones first: as `top_k`.

    Args:
        x: float [..., V], without NaN.
        count: k <= V.

    Returns:
        int32 [..., k].
    """
    size = x.shape[-1]
    if size <= 2 * count * _SMALL_GROUP:
        return jax.lax.top_k(x, count)[1]
    # Each of the k largest is in one of the k groups with the largest maxima.
    group = _GROUP if size > count * _GROUP else _SMALL_GROUP
    groups = _in_groups(x, group)
    chosen = jnp.sort(largest_few(jnp.max(groups, axis=-1), count), axis=-1)
    few = jnp.take_along_axis(groups, chosen[..., None], axis=-2)
    best = largest_few(few.reshape(*few.shape[:-2], -1), count)
    return jnp.take_along_axis(chosen, best // group, axis=-1) * group + best % group


def _in_groups(x: jax.Array, group: int = _GROUP) -> jax.Array:
    """[..., V] -> [..., ceil(V / group), group]."""
    if missing := -x.shape[-1] % group:  # -infinity at the end is never the first of equal ones
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)
    return x.reshape(*x.shape[:-1], -1, group)
