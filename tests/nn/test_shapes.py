"""Shapes and types of the public array functions, by the letters of their docstrings."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s3d_jax.decoding import sampling
from s3d_jax.decoding.sampling import SamplingFeatures, SamplingParams
from s3d_jax.nn import attention, cache, draft, layers, rope, streams, transformer
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import RopeConfig
from s3d_jax.weights import dense, exact, int8
from s3d_jax.weights.blocks import Blocks
from s3d_jax.weights.formats import FORMATS
from tests.tiny import tiny_config

# The sizes differ, so that no axis can stand for another. Q: queries of a key head; γ, γ+1, A, A·γ:
# drafts; M masks, and U = T·(1+M); R/2: rotated pairs; I, O: inputs and outputs; r: a rank.
SIZES = dict(B=3, T=7, S=64, N=6, K=2, H=10, D=24, V=31, Q=13, M=8, U=63, r=9, I=50, O=17)
SIZES |= {"1": 1, "γ": 4, "γ+1": 5, "A": 11, "A·γ": 44, "R/2": 5}
assert len({*SIZES.values()}) == len(SIZES) - 1  # γ+1 = R/2


def struct(spec):
    """ "float32 B T" -> an abstract array; "key B" -> typed keys; containers of such likewise."""
    if not isinstance(spec, str):
        return spec
    kind, *letters = spec.split()
    shape = tuple(SIZES[letter] for letter in letters)
    dtype = jax.eval_shape(lambda: jax.random.key(0)).dtype if kind == "key" else jnp.dtype(kind)
    return jax.ShapeDtypeStruct(shape, dtype)


def structs(specs):
    return jax.tree.map(struct, specs)


CONFIG = tiny_config(dtype="bfloat16", num_layers=2)
TWO = DraftConfig((False, True), 4)
PARAMS = transformer.abstract_params(CONFIG)
DRAFT = draft.DraftParams(mask_embeddings=struct("bfloat16 M D"))
CACHE = jax.eval_shape(lambda: cache.init_cache(CONFIG, 3, 64, jnp.ones(3)))
ROWS = structs(
    SamplingParams("key B", *["float32 B"] * 2, *["float32 B"] * 5, "float32 B V").replace(
        top_k="int32 B"
    )
)
ALL = SamplingFeatures(True, True, True, True)
HEADS = "bfloat16 B T N H", "bfloat16 B K S H", "bfloat16 B K S H", "bool B T S"
SEEN = attention.Layout("int32 B", "int32 B T", "int32 1 S", "bool B T S")

INT8 = "int8 O I", "float32 O"
CASES = {
    "project": (dense.multiply, ("bfloat16 B T I", "bfloat16 O I", jnp.float32), "float32 B T O"),
    "int8": (int8.multiply, ("bfloat16 B T I", *INT8, jnp.bfloat16), "bfloat16 B T O"),
    "row_max": (exact.row_max, ("float32 B T S",), "float32 B T 1"),
    "row_max_abs": (exact.row_max_abs, ("float32 B T S",), "float32 B T 1"),
    "row_sum": (partial(exact.row_sum, bound=1.0), ("float32 B T S",), "float32 B T 1"),
    "softmax": (exact.softmax, ("float32 B T S",), "float32 B T S"),
    "norm": (partial(exact.norm, eps=1e-5), ("float32 B T D",), "float32 B T D"),
    "rms_norm": (partial(layers.rms_norm, eps=1e-5), ("float32 B T D",), "float32 B T D"),
    "low_rank": (
        layers.low_rank,
        ("bfloat16 B T I", {"down": "float32 I r", "up": "float32 r O"}),
        "bfloat16 B T O",
    ),
    "bridge": (
        partial(layers.bridge, eps=1e-5),
        ("bfloat16 B T D", {"down": "float32 D r", "up": "float32 r D"}),
        "bfloat16 B T D",
    ),
    "rotary_table": (
        partial(rope.rotary_table, RopeConfig(), 10),
        ("int32 B T", "int32 B"),
        ("float32 B T R/2", "float32 B T R/2"),
    ),
    "rotate": (rope.rotate, ("bfloat16 B T N H", *["float32 B T R/2"] * 2), "bfloat16 B T N H"),
    "write": (
        cache.write,
        ("bfloat16 B K S H", "float32 B K T H", "int32 B"),
        "bfloat16 B K S H",
    ),
    "scores": (
        attention.attention_scores,
        ("bfloat16 B K Q H", "bfloat16 B K S H"),
        "float32 B K Q S",
    ),
    "mix": (attention.attention_mix, ("bfloat16 B K Q S", "bfloat16 B K S H"), "float32 B K Q H"),
    "attend": (partial(attention.attend, scale=1.0, softcap=9.0), HEADS, "bfloat16 B T N H"),
    "attend exactly": (
        partial(attention.attend, scale=1.0, softcap=None, exact=True),
        HEADS,
        "bfloat16 B T N H",
    ),
    "layout_after_committed": (
        lambda cache: attention.layout_after_committed(cache, 7, False, 64),
        (CACHE,),
        SEEN,
    ),
    "layout_after_anchors": (
        lambda anchors: attention.layout_after_anchors(anchors, 4, 7, True).seen,
        ("int32 B A",),
        jax.ShapeDtypeStruct((3, 44, 7 + 44), bool),
    ),
    "forward": (
        partial(transformer.forward, CONFIG),
        (PARAMS, "int32 B T", CACHE),
        ("float32 B T V", CACHE),
    ),
    "forward with masks": (
        lambda params, tokens, cache, arrays, keep: transformer.forward(
            CONFIG, params, tokens, cache, keep=keep, draft=arrays, num_masks=8
        )[0],
        (PARAMS, "int32 B T", CACHE, DRAFT, "bool K"),  # as many layers as key heads
        "float32 B U V",
    ),
    "fill_cache": (partial(transformer.fill_cache, CONFIG), (PARAMS, "int32 B T", CACHE), CACHE),
    "forward_logits": (
        partial(transformer.forward_logits, CONFIG),
        (PARAMS, "int32 B T"),
        "float32 B T V",
    ),
    "target_stream": (
        lambda params, tokens: streams.target_stream(CONFIG, params, tokens, 7 + 44)[0],
        (PARAMS, "int32 B T"),
        "float32 B T V",
    ),
    "draft_stream": (
        lambda params, arrays, tokens, anchors: streams.draft_stream(
            CONFIG,
            params,
            TWO,
            arrays,
            tokens,
            anchors,
            streams.target_cache(CONFIG, params, tokens, 7 + 44),
        ),
        (PARAMS, DRAFT, "int32 B T", "int32 B A"),
        "float32 B A·γ V",
    ),
    "untrained_draft": (
        lambda params: draft.untrained_draft(CONFIG, params).mask_embeddings,
        (PARAMS,),
        "bfloat16 1 D",
    ),
    "mean_embedding": (partial(draft.mean_embedding, CONFIG), (PARAMS,), "float32 D"),
    "penalize": (
        sampling.penalize,
        ("float32 B T V", ROWS, "bool B V", "int32 B T V"),
        "float32 B T V",
    ),
    "warp": (partial(sampling.warp, features=ALL), ("float32 B T V", ROWS), "float32 B T V"),
    "choose": (
        lambda logits, rows, noise: sampling.choose(logits, rows, ALL, noise),
        ("float32 B T V", ROWS, "float32 B T V"),
        "int32 B T",
    ),
    "accept": (
        sampling.accept,
        ("int32 B γ", "int32 B γ+1", "bool B"),
        ("int32 B", "int32 B"),
    ),
    "gumbel_noise": (
        partial(sampling.gumbel_noise, vocab_size=SIZES["V"]),
        ("key B T",),
        "float32 B T V",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_shapes(name):
    function, arguments, result = CASES[name]
    arguments = structs(arguments)
    static = [i for i, x in enumerate(arguments) if isinstance(x, type)]
    found = jax.eval_shape(jax.jit(function, static_argnums=static), *arguments)
    same = jax.tree.map(
        lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), found, structs(result)
    )
    assert jax.tree.all(same), (found, structs(result))


@pytest.mark.parametrize("name", FORMATS)
def test_shapes_of_weight_formats(name):
    weights = Blocks(4, 25, offset=True) if name == "blocks" else FORMATS[name]
    arrays = tuple(map(jnp.asarray, weights.store(np.ones((17, 50), "bfloat16"))))
    x, rows = struct("bfloat16 B T I"), struct("int32 B T")
    assert len(arrays) == len(weights.parts("weight")) and weights.parts("weight")[0] == "weight"
    for found, expected in (
        (jax.eval_shape(lambda x: weights.multiply(x, arrays, jnp.float32), x), "float32 B T O"),
        (jax.eval_shape(lambda r: weights.look_up(arrays, r, "bfloat16"), rows), "bfloat16 B T I"),
        (weights.widen(arrays, "float32"), "float32 O I"),
    ):
        assert (found.shape, found.dtype) == (struct(expected).shape, struct(expected).dtype)
