"""Rotary tables of real configs against HF transformers, at positions up to 131,071."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.families import family_of
from s3d_jax.nn.rope import inverse_frequencies, rotary_table
from s3d_jax.settings.model import ModelConfig
from tests.conftest import need

torch = need("torch")
transformers = need("transformers")

LONGEST = 131_072
POSITIONS = np.r_[:40, np.random.default_rng(0).integers(0, LONGEST, 400), 4096, LONGEST - 1]
ULP = 2.0**-23

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CASES = {  # real configs, and changes of their rope_scaling
    "default": ("Llama-2-7b-chat-hf", {}),
    "base 1e6": ("Qwen3-8B", {}),
    "heads of 256": ("mlc_gemma-2b", {}),
    "llama3": ("Llama-3.2-1B", {}),
    # The type is called "su" there: we read it, HF no longer does.
    "longrope": ("Phi-3-vision-128k_text_su_rope", {"type": "longrope"}),
    "longrope, partial": ("mlc_Phi-4-mini-instruct", {}),
    "yarn": ("Qwen2.5-7B-Instruct", YARN),
    "linear": ("Llama-2-7b-chat-hf", {"type": "linear", "factor": 8.0}),
    "dynamic": ("Llama-2-7b-chat-hf", {"type": "dynamic", "factor": 32.0}),
}


def configs(data_dir, name: str):
    """Ours, and HF's rotary module."""
    file, scaling = CASES[name]
    fields = json.loads((data_dir / "configs" / f"{file}.config.json").read_text())
    fields["rope_scaling"] = (fields.get("rope_scaling") or {}) | scaling
    kind = fields["model_type"]
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    theirs = transformers.CONFIG_MAPPING[kind].from_dict(fields)
    rotary = getattr(module, type(theirs).__name__.replace("Config", "RotaryEmbedding"))
    return family_of(fields).config(fields), rotary(theirs)


def tables(config: ModelConfig, rotary, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Our and HF's (cos, sin), [2, T, R/2] each."""
    theirs = torch.stack(rotary(torch.zeros(1), torch.tensor(positions)[None]))[:, 0].numpy()
    ours = jax.jit(rotary_table, static_argnums=(0, 1))(
        config.rope,
        config.head_dim,
        jnp.asarray(positions)[None],
        jnp.asarray([positions.max() + 1]),
    )
    return np.stack(ours)[:, 0], theirs[..., : theirs.shape[-1] // 2]


@pytest.mark.parametrize("last", [4095, LONGEST - 1])  # LongRoPE: short factors, long factors
@pytest.mark.parametrize("name", [name for name in CASES if name != "dynamic"])
def test_tables(data_dir, name, last):
    """Equal, except for a pair or two whose frequency torch's power rounds differently.

    That power depends on the machine; ours is rounded correctly.
    """
    config, rotary = configs(data_dir, name)
    ours, theirs = tables(config, rotary, POSITIONS[last >= POSITIONS])
    own = inverse_frequencies(config.rope, config.head_dim, long=last > 4095)
    same = own == rotary.inv_freq.numpy()
    assert (~same).sum() <= 2 and (np.abs(own / rotary.inv_freq.numpy() - 1) <= 2 * ULP).all()
    assert np.abs(ours - theirs)[..., same].max() <= ULP


def test_dynamic_tables(data_dir):
    """Its frequencies are powers taken at run time, which differ in the last bits."""
    config, rotary = configs(data_dir, "dynamic")
    ours, theirs = tables(config, rotary, POSITIONS)
    angles = POSITIONS[:, None] * rotary.inv_freq.numpy()
    assert (np.abs(ours - theirs) <= 4 * ULP * (1 + angles)).all()
