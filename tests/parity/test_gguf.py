"""GGUF files of every architecture against HF transformers on the weights that they stand for."""

import jax.numpy as jnp
import numpy as np
import pytest

import convert
import s3d_jax
from convert import parity
from convert.sources.open import open_origin
from s3d_jax.nn.transformer import forward_logits
from tests.conftest import need
from tests.parity.test_families import (
    LLAMA3,
    LONGROPE,
    MODELS,
    TOKENS,
    hf_greedy,
    hf_logits,
    hf_model,
)
from tests.sampled import combinations

need("gguf")
torch = need("torch")

from tests.convert.gguf_file import write_gguf  # noqa: E402 (needs gguf)

# Sizes that blocks of 32 divide; the settings that llama.cpp hard-codes are theirs.
SIZES = dict(
    hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16
)
PUBLISHED_LLAMA3 = LLAMA3 | {"original_max_position_embeddings": 8192}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}
FEATURES = {
    "llama": ("Llama", dict(rope_parameters=PUBLISHED_LLAMA3, attention_bias=True)),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", dict(rope_parameters=YARN)),
    "phi3": (
        "Phi3",
        dict(
            rope_parameters=LONGROPE | {"partial_rotary_factor": 0.5},
            original_max_position_embeddings=40,
            sliding_window=250,
            tie_word_embeddings=True,
        ),
    ),
    "gemma": ("Gemma", {}),
    "gemma2": (
        "Gemma2",
        dict(
            sliding_window=21,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=2.5,
            final_logit_softcapping=9.0,
        ),
    ),
    "gemma3": (
        "Gemma3Text",
        dict(
            num_hidden_layers=7,
            sliding_window=21,
            query_pre_attn_scalar=16,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
    ),
    "olmo2": ("Olmo2", {}),
    "granite": MODELS["granite"],
    "smollm3": ("SmolLM3", dict(no_rope_layers=[1, 1, 1, 0])),
}


def extra_tensors(config) -> dict[str, np.ndarray]:
    """The factors of rotary embeddings, which llama.cpp stores as tensors."""
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32)
            for kind in ("long", "short")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = rope["rope_theta"] ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    return {"rope_freqs.weight": (plain / scaled.numpy()).astype(np.float32)}


@pytest.mark.parametrize(
    "name, kind",
    combinations(
        FEATURES,
        ["F16", "Q8_0"],
        quick=[("llama", "Q8_0"), ("phi3", "F16"), ("gemma3", "Q8_0"), ("smollm3", "F16")],
    ),
)
def test_architecture(name, kind, tmp_path):
    model = hf_model(name, models=FEATURES, sizes=SIZES)
    path = tmp_path / "model.gguf"
    write_gguf(path, name, model, kind, extra=extra_tensors(model.config))
    options = dict(dtype="float32", parity=False, progress=False)
    report = convert.convert(path, tmp_path / "native", **options)
    assert not report.unneeded
    # What `s3d-convert verify` compares with: HF's model made of the file's settings and tensors.
    found = parity._hf_model(open_origin(path), torch.float32).eval()
    theirs = hf_logits(model, TOKENS[None, :30])
    np.testing.assert_allclose(hf_logits(found, TOKENS[None, :30]), theirs, atol=2e-5)
    lm = s3d_jax.load(tmp_path / "native")
    for length in (30, 700):
        theirs = hf_logits(model, TOKENS[None, :length])
        ours = forward_logits(lm.config, lm.params, jnp.asarray(TOKENS[None, :length]))
        assert np.abs(theirs).max() > 1
        assert np.abs(np.asarray(ours) - theirs).max() <= 2e-4
    expected = hf_greedy(model, TOKENS[:30], 40)
    assert len(set(expected)) > 5
    assert lm.generate(TOKENS[:30], max_new_tokens=40, method="ar")[0].tokens == expected
