"""Rotary tables against HF transformers, at positions up to 131,071."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.families import FAMILIES
from s3d_jax.config import ModelConfig, RopeConfig
from s3d_jax.rope import inverse_frequencies, rotary_table
from tests.conftest import need

torch = need("torch")
transformers = need("transformers")

LONGEST = 131_072
POSITIONS = np.r_[:40, np.random.default_rng(0).integers(0, LONGEST, 400), 4096, LONGEST - 1]
ULP = 2.0**-23

LLAMA3 = RopeConfig("llama3", theta=5e5, factor=32.0, original_max_position_embeddings=8192)
YARN = RopeConfig(
    *("yarn", 1e6), factor=4.0, original_max_position_embeddings=32768, attention_factor=1.138
)
LONGROPE = RopeConfig(
    "longrope",
    short_factors=np.linspace(1, 3, 48).round(3).tolist(),
    long_factors=np.linspace(1, 60, 48).round(3).tolist(),
    original_max_position_embeddings=4096,
    attention_factor=1.1902380714238083,
)
CASES = {
    "Llama 2": ("llama", 128, RopeConfig()),
    "Llama 3.2": ("llama", 64, LLAMA3),
    "Qwen 2.5": ("qwen2", 128, RopeConfig(theta=1e6)),
    "Gemma 2": ("gemma2", 256, RopeConfig()),
    "Qwen 3, YaRN": ("qwen3", 128, YARN),
    "linear": ("llama", 96, RopeConfig("linear", factor=8.0)),
    "Phi 3.5": ("phi3", 96, LONGROPE),
    "Phi 4 mini": ("phi3", 128, LONGROPE.replace(rotary_fraction=0.75)),
}


def hf_rotary(model_type: str, head_dim: int, rope: RopeConfig):
    """HF's module, made from the config that we write."""
    longest = rope.original_max_position_embeddings if rope.type == "dynamic" else LONGEST
    heads = dict(num_heads=4, num_kv_heads=4, head_dim=head_dim)
    config = ModelConfig(
        *(8, 4 * head_dim, 8, 1), **heads, max_position_embeddings=longest, rope=rope
    )
    hf_config = transformers.CONFIG_MAPPING[model_type](
        **FAMILIES[model_type].write(config), pad_token_id=None
    )
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    return getattr(module, type(hf_config).__name__.replace("Config", "RotaryEmbedding"))(hf_config)


def tables(model_type: str, head_dim: int, rope: RopeConfig, positions: np.ndarray):
    """HF's and our (cos, sin), [2, T, R/2] each, and HF's frequencies."""
    module = hf_rotary(model_type, head_dim, rope)
    theirs = torch.stack(module(torch.zeros(1), torch.tensor(positions)[None]))[:, 0].numpy()
    length = jnp.asarray([positions.max() + 1])
    table = jax.jit(rotary_table, static_argnums=(0, 1))
    ours = np.stack(table(rope, head_dim, jnp.asarray(positions)[None], length))[:, 0]
    return theirs[..., : theirs.shape[-1] // 2], ours, module.inv_freq.numpy()


@pytest.mark.parametrize("last", [4095, LONGEST - 1])  # LongRoPE: short factors, long factors
@pytest.mark.parametrize("name", CASES)
def test_tables(name, last):
    """Equal, but for a pair or two whose frequency torch's power rounds otherwise.

    That power depends on the machine; ours is rounded correctly.
    """
    model_type, head_dim, rope = CASES[name]
    theirs, ours, frequencies = tables(model_type, head_dim, rope, POSITIONS[last >= POSITIONS])
    own = inverse_frequencies(rope, head_dim, long=last > 4095)
    same = own == frequencies
    assert (~same).sum() <= 2 and (np.abs(own / frequencies - 1) <= 2 * ULP).all()
    assert np.abs(ours - theirs)[..., same].max() <= ULP


def test_dynamic_tables():
    """Its frequencies are powers taken at run time, which differ in the last bits."""
    rope = RopeConfig("dynamic", factor=32.0, original_max_position_embeddings=4096)
    theirs, ours, frequencies = tables("llama", 128, rope, POSITIONS)
    angles = POSITIONS[:, None] * frequencies
    assert (np.abs(ours - theirs) <= 4 * ULP * (1 + angles)).all()
