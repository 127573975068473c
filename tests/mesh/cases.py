"""What runs on eight devices that XLA makes of a CPU: `test_mesh.py` runs this file.

Not collected by itself, since the number of devices is fixed before jax begins.
"""

import re

import jax
import numpy as np
import pytest

import s3d_jax
from s3d_jax.drafters import stored
from s3d_jax.drafters.stored import save_draft
from s3d_jax.engine import programs
from s3d_jax.lm import EMBEDDED
from s3d_jax.nn.draft import DraftParams, untrained_draft
from s3d_jax.nn.sharding import build_mesh, share_bytes, sharding_of
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import ModelConfig, RopeConfig
from s3d_jax.storage import native
from s3d_jax.storage.trees import flatten
from s3d_jax.weights.formats import weight_format
from s3d_jax.weights.trees import store_tree
from tests.tiny import tiny_config, tiny_params

MESHES = ("model=2", "data=2,model=2", "model=4", "data=4,model=2")
PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9], [3], [9] * 20]
SAMPLED = dict(temperature=0.9, top_p=0.9, repetition_penalty=1.1, seed=7)
LONGROPE = RopeConfig(
    "longrope",
    short_factors=(1.0, 1.1, 1.3, 1.7),
    long_factors=(1.2, 2.5, 4.0, 9.0),
    original_max_position_embeddings=20,
)
WINDOWS = (8, None)
FAMILIES = {
    "llama": dict(num_kv_heads=2),
    "mistral": dict(sliding_window=(8, 8)),
    "phi3": dict(rope=LONGROPE, num_kv_heads=8),
    "qwen2": dict(qkv_bias=True, tie_embeddings=True, num_kv_heads=1),
    "qwen3": dict(qk_norm=True, num_kv_heads=4),
    "gemma": dict(norm_offset=1.0, embedding_scale=5.0, activation="gelu_tanh", num_kv_heads=1),
    "gemma2": dict(
        post_norms=True, attention_softcap=5.0, logit_softcap=3.0, sliding_window=WINDOWS
    ),
    "gemma3": dict(
        qk_norm=True,
        post_norms=True,
        sliding_window=WINDOWS,
        local_rope=RopeConfig(theta=100.0),
        num_kv_heads=1,
    ),
    "olmo2": dict(qk_norm=True, qk_norm_joint=True, pre_norms=False, post_norms=True),
    "granite": dict(residual_scale=0.3, logit_divisor=2.0, attention_scale=0.2),
    "smollm3": dict(rope_layers=(True, False), mlp_bias=True, attention_out_bias=True),
    "nine heads": dict(num_heads=9, num_kv_heads=3, vocab_size=31),  # as SmolLM2-135M
}


def config_of(family: str, **changes) -> ModelConfig:
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2)
    heads = dict(num_heads=8, num_kv_heads=2, head_dim=8)
    return tiny_config(**(sizes | heads | FAMILIES[family] | changes))


def write(folder, config: ModelConfig, draft: bool = False) -> str:
    """A random model, and a draft of it that has all parts."""
    params = tiny_params(config.replace(quantization=None))
    if config.quantization:
        params = store_tree(weight_format(config), jax.device_get(params))
    native.save(folder / "model", config, params)
    if draft:
        rng = np.random.default_rng(1)

        def low_rank(inputs: int, outputs: int) -> dict[str, np.ndarray]:
            shapes = dict(down=(inputs, 3), up=(3, outputs))
            return {k: rng.normal(0, 0.02, shape).astype(np.float32) for k, shape in shapes.items()}

        d, f = config.hidden_size, config.intermediate_size
        recalled = d + config.num_kv_heads * config.head_dim
        deltas = {
            "attention": {
                "qkv": low_rank(d, config.qkv_features),
                "out": low_rank(config.num_heads * config.head_dim, d),
            },
            "mlp": {"gate_up": low_rank(d, 2 * f), "down": low_rank(f, d)},
        }
        params = DraftParams(
            np.asarray(untrained_draft(config, params).mask_embeddings),
            deltas={"layers_0": deltas},
            bridges={"layers_2": low_rank(recalled, d)},
            chain=low_rank(2 * d, d),
            vocabulary=np.arange(0, config.vocab_size, 2, dtype=np.int32),
        )
        skip = tuple(i == 1 for i in range(config.num_layers))
        save_draft(folder / "model", "default", DraftConfig(skip, 3), params, {})
    return str(folder / "model")


def outputs(lm, **options) -> list[list[int]]:
    return [r.tokens for r in lm.generate(PROMPTS, max_new_tokens=24, **options)]


def check_equal(path: str, meshes, options: dict) -> None:
    """The tokens of one device, by AR and by S3D; as many programs as there."""
    one = s3d_jax.load(path)
    expected = outputs(one, method="ar", **options)
    assert outputs(one, method="s3d", **options) == expected
    for mesh in meshes:
        lm = s3d_jax.load(path, mesh=mesh)
        for method in ("ar", "s3d"):
            assert outputs(lm, method=method, **options) == expected, (mesh, method)
        assert len(lm.programs) == len(one.programs)


QUICK = [
    ("llama", "model=4", {}),
    ("olmo2", "data=2,model=2", SAMPLED),
    ("gemma3", "data=4,model=2", {}),
    ("nine heads", "model=2", SAMPLED),
]


@pytest.mark.parametrize(("family", "mesh", "options"), QUICK)
def test_tokens_are_those_of_one_device(family, mesh, options, tmp_path):
    check_equal(write(tmp_path, config_of(family)), [mesh], options)


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [{}, SAMPLED])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_families_on_all_meshes(family, options, tmp_path):
    check_equal(write(tmp_path, config_of(family)), MESHES, options)
