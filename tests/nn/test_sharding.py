"""How a model is arranged for several devices; what needs several of them is in tests/mesh."""

import numpy as np
import pytest

from s3d_jax.errors import ConfigError
from s3d_jax.nn.sharding import arranged, as_in_files, rule_of
from s3d_jax.settings.mesh import MeshShape
from s3d_jax.settings.model import ModelConfig
from s3d_jax.storage.trees import flatten
from tests.tiny import tiny_config, tiny_lm


def sharded(shards: int, **changes) -> ModelConfig:
    return tiny_config(shards=shards, **changes)


def test_each_share_of_a_fused_matrix_is_a_share_of_each_part():
    config = sharded(2, num_heads=4, num_kv_heads=2, head_dim=1 * 2)
    names = ["q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1"]
    rows = np.repeat(names, 2)
    found = arranged(config, "layers_0/attention/qkv/weight", rows[:, None])[::2, 0].tolist()
    assert found == ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]
    up = arranged(config, "deltas/layers_0/attention/qkv/up", rows[None])[0, ::2].tolist()
    assert up == found
    halves = np.repeat(["gate", "up"], 40)
    found = arranged(config, "layers_0/mlp/gate_up/bias", halves).reshape(4, 20)
    assert (found == np.array(["gate", "up"] * 2)[:, None]).all()


def test_key_heads_that_the_mesh_does_not_divide_are_repeated():
    config = sharded(4, num_heads=8, num_kv_heads=2, head_dim=2)
    assert (config.attention_shards, config.cached_heads) == (4, 4)
    assert config.qkv_features == (8 + 2 * 4) * 2
    heads = np.repeat([*"abcdefgh", "k0", "k1", "v0", "v1"], 2)
    found = arranged(config, "layers_0/attention/qkv/scale", heads)[::2].reshape(4, 4).tolist()
    assert found == [
        ["a", "b", "k0", "v0"],
        ["c", "d", "k0", "v0"],
        ["e", "f", "k1", "v1"],
        ["g", "h", "k1", "v1"],
    ]


def test_attention_stays_whole_where_the_query_heads_are_not_divided():
    config = sharded(2, num_heads=9, num_kv_heads=3)
    assert (config.attention_shards, config.cached_heads) == (1, 3)
    rows = np.arange(config.qkv_features)
    assert (arranged(config, "layers_0/attention/qkv/bias", rows) == rows).all()


@pytest.mark.parametrize("changes", [{}, dict(num_heads=8), dict(qk_norm=True, qk_norm_joint=True)])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_files_hold_arrays_as_for_one_device(shards, changes):
    config = sharded(shards, qkv_bias=True, mlp_bias=True, **changes)
    params = tiny_lm(qkv_bias=True, mlp_bias=True, **changes).params
    for path, array in flatten(params).items():
        array = np.asarray(array)
        there = arranged(config, path, array)
        assert (as_in_files(config, path, there) == array).all(), path
    assert "shards" not in config.to_dict()
    with pytest.raises(ConfigError, match="unknown fields"):
        ModelConfig.from_dict(config.to_dict() | {"shards": 2})


@pytest.mark.parametrize(
    ("path", "axes"),
    [
        ("embed/embedding", ("model",)),
        ("embed/scale", ("model",)),
        ("lm_head/weight", ("model",)),
        ("layers_3/attention/qkv/weight", ("model",)),
        ("layers_3/attention/qkv/bias", ("model",)),
        ("layers_3/mlp/gate_up/scale", ("model",)),
        ("layers_3/attention/out/weight", (None, "model")),
        ("layers_3/mlp/down/weight", (None, "model")),
        ("layers_3/mlp/down/scale", (None, "model")),  # of a vector, the first alone
        ("layers_3/mlp/down/bias", ()),
        ("layers_3/attention_norm/scale", ()),
        ("layers_3/attention/q_norm/scale", ()),
        ("deltas/layers_3/mlp/gate_up/up", (None, "model")),
        ("deltas/layers_3/mlp/gate_up/down", ()),
        ("deltas/layers_3/mlp/down/down", ("model",)),
        ("deltas/layers_3/mlp/down/up", ()),
        ("bridges/layers_3/down", ()),
        ("bridges/final_norm/up", ()),
        ("chain/down", ()),
        ("mask_embeddings", ()),
        ("vocabulary", ()),
        ("head/1", ("model",)),
    ],
)
def test_rules(path, axes):
    assert rule_of(path) == axes


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ("model=4", (1, 4)),
        ("data=2, model=3", (2, 3)),
        ({"data": 2}, (2, 1)),
        (MeshShape(3, 2), (3, 2)),
    ],
)
def test_meshes(value, shape):
    found = MeshShape.of(value)
    assert (found.data, found.model) == shape


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("model", "is written as"),
        ("model=x", "is written as"),
        ("model=-1", "is written as"),
        ("", "is written as"),
        ("model=2,model=2", "names an axis twice"),
        ("tensor=2", "'tensor' is none"),
        ("model=0", "at least 1"),
        ({"model": 1.5}, "an integer"),
        (4, "mapping of axes"),
    ],
)
def test_what_is_no_mesh_is_refused(value, words):
    with pytest.raises(ConfigError, match=words):
        MeshShape.of(value)


def test_what_is_kept_several_times_is_said():
    config = tiny_config(num_heads=8, num_kv_heads=2, vocab_size=64)
    assert MeshShape(4, 2).replicated(config) == []
    (keys,) = MeshShape(1, 4).replicated(config)
    assert keys.startswith("key heads, 2 times (4 devices do not divide 2: 1 on each)")
    attention, table = MeshShape(1, 2).replicated(tiny_config(num_heads=9, num_kv_heads=3))
    assert "attention and cache" in attention and "9 query heads" in attention
    assert "vocabulary of 31" in table
    with pytest.raises(ConfigError, match="width of 40: model=2 does"):
        MeshShape(1, 3).check_divides(tiny_config(num_heads=9, num_kv_heads=3))
