"""Settings are checked when they are made, and survive JSON."""

import json
import math

import numpy as np
import pytest

from s3d_jax.errors import ConfigError
from s3d_jax.settings.drafting import DraftConfig, symmetric_skip
from s3d_jax.settings.model import ModelConfig, RopeConfig
from s3d_jax.settings.sampling import SamplingConfig
from tests.tiny import tiny_config

LONGROPE = RopeConfig(
    "longrope",
    short_factors=(1.0, 2.0),
    long_factors=(1.0, 2.0, 3.0),
    original_max_position_embeddings=8,
)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_layers": 2.0}, "num_layers"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_kv_heads": 4}, "multiple"),
        ({"head_dim": 7}, "even"),
        ({"activation": "relu"}, "relu"),
        ({"dtype": "int4"}, "int4"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"sliding_window": (4,)}, "1 entries"),
        ({"sliding_window": (4, 0, 4, None)}, "> 0"),
        ({"sliding_window": 4}, "list with one entry per layer"),
        ({"tie_embeddings": "no"}, "tie_embeddings must be True or False"),
        ({"qkv_bias": 1}, "qkv_bias must be True or False"),
        ({"logit_softcap": -1}, "logit_softcap"),
        ({"attention_softcap": float("inf")}, "attention_softcap"),
        ({"attention_scale": float("nan")}, "attention_scale"),
        ({"attention_scale": 0}, "attention_scale"),
        ({"residual_scale": 0}, "residual_scale"),
        ({"logit_divisor": "x"}, "logit_divisor"),
        ({"pre_norms": False}, "pre_norms and post_norms are both False"),
        ({"qk_norm_joint": True}, "qk_norm_joint is True, and qk_norm is False"),
        ({"rope_layers": (True,)}, "rope_layers has 1 entries, the model 4 layers"),
        ({"rope_layers": (True, 1, True, False)}, "rope_layers entries must be True or False"),
        ({"rope_layers": True}, "rope_layers must be a list"),
        ({"rope": LONGROPE}, "rope has 2 short_factors and 3 long_factors; .* needs 5 of each"),
        ({"rope": RopeConfig(short_factors=(1.0,))}, "no other type has any"),
        ({"embedding_scale": "x"}, "embedding_scale"),
        ({"norm_offset": None}, "norm_offset"),
        ({"rope": {"type": "default"}}, "rope must be a RopeConfig"),
        ({"dtype": np.dtype("float32")}, "dtype"),
    ],
)
def test_model_config_refuses(change, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**change)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"type": "ntk"}, "'ntk'"),
        ({"theta": 0}, "theta"),
        ({"theta": 1}, "theta must be above 1"),
        ({"type": "linear", "factor": -1}, "factor"),
        ({"rotary_fraction": 1.5}, "rotary_fraction"),
        ({"rotary_fraction": "x"}, "rotary_fraction"),
        ({"low_freq_factor": None}, "low_freq_factor"),
        ({"attention_factor": 0}, "attention_factor"),
        ({"type": "yarn", "factor": 2.0}, "original_max_position_embeddings"),
        (
            {"type": "yarn", "original_max_position_embeddings": 8, "beta_slow": 32.0},
            "beta_slow < beta_fast",
        ),
        ({"type": "longrope"}, "original_max_position_embeddings"),
        ({"short_factors": 2.0}, "short_factors must be a list"),
        ({"long_factors": (1.0, -1.0)}, "long_factors must be a list"),
        ({"original_max_position_embeddings": 0.5}, "original_max_position_embeddings"),
        ({"type": "dynamic", "factor": 2.0}, "original_max_position_embeddings"),
        (
            {
                "type": "llama3",
                "original_max_position_embeddings": 8,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
            },
            "low_freq_factor",
        ),
    ],
)
def test_rope_config_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        RopeConfig(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"skip": (True, True)}, "skips all"),
        ({"skip": (True, 0)}, "True and False"),
        ({"skip": 2}, "skip must be a list"),
        ({"skip": "no"}, "skip must be a list"),
        ({"skip": (True, False), "gamma": 0}, "gamma must be an integer >= 1, got 0"),
        ({"skip": (True, False), "gamma": 2.5}, "2.5"),
        ({"skip": (True, False), "block_attention": "both"}, "both"),
    ],
)
def test_draft_config_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        DraftConfig(**fields)


def test_lists_and_numbers_of_numpy_become_plain_ones():
    """Hashable, since they are static arguments, and fit for JSON."""
    draft = DraftConfig([np.bool_(False), True], gamma=np.int64(2))
    assert draft == DraftConfig((False, True), gamma=2) and hash(draft)
    assert json.loads(json.dumps(draft.to_dict()))["gamma"] == 2
    config = tiny_config(sliding_window=[np.int64(4), None, 4, None], vocab_size=np.int32(31))
    assert config == tiny_config(sliding_window=(4, None, 4, None)) and hash(config)
    assert json.dumps(config.to_dict())
    row = SamplingConfig(logit_bias=[[np.int64(3), np.float32(0.5)]], temperature=np.float32(0.5))
    assert row == SamplingConfig(logit_bias=((3, 0.5),), temperature=0.5) and hash(row)


def test_a_draft_must_fit_its_model():
    with pytest.raises(ConfigError, match="2 entries, the model has 4 layers"):
        DraftConfig((True, False)).validate_for(tiny_config())


@pytest.mark.parametrize(
    "field, value",
    [
        *(("temperature", v) for v in (-0.1, math.nan, math.inf, 1e31, 10**400, "1")),
        *(("top_k", v) for v in (-1, 1.5, True, 2**31)),
        *(("top_p", v) for v in (0, 1.1, -1, math.nan)),
        *(("min_p", v) for v in (-0.1, 1.5)),
        *(("repetition_penalty", v) for v in (0, -1, math.nan, 1e-44, 1e39)),
        *(("presence_penalty", v) for v in (math.inf, -1e300)),
        *(("frequency_penalty", v) for v in (math.nan, 1e39)),
        *(("logit_bias", ((token, 1.0),)) for token in (-1, 0.5, "a")),
        *(("logit_bias", ((1, bias),)) for bias in (math.inf, math.nan, 1e31, "a", None)),
        *(("logit_bias", v) for v in (5, (1, 2), ((1, 2, 3),), ((1, 2.0), (1, 3.0)))),
    ],
)
def test_sampling_config_refuses(field, value):
    with pytest.raises(ConfigError, match=field):
        SamplingConfig(**{field: value})


def test_json_round_trip():
    config = tiny_config(
        rope=LONGROPE.replace(short_factors=[1.0] * 5, long_factors=[2.0] * 5),
        local_rope=RopeConfig("linear", factor=2.0),
        sliding_window=(3, None, 3, None),
        rope_layers=(True, False, True, True),
        qk_norm=True,
    )
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    draft = DraftConfig((False, True, False), gamma=3)
    assert DraftConfig.from_dict(json.loads(json.dumps(draft.to_dict()))) == draft
    with pytest.raises(ConfigError, match="unknown fields \\['colour'\\]"):
        ModelConfig.from_dict(config.to_dict() | {"colour": "red"})
    with pytest.raises(ConfigError, match="missing fields \\['skip'\\]"):
        DraftConfig.from_dict({"gamma": 3})


def test_symmetric_skip():
    assert symmetric_skip(5, 2) == (False, False, True, True, False)
    assert symmetric_skip(8, 4) == (False, False, True, True, True, True, False, False)
    assert symmetric_skip(3, 0) == (False,) * 3
    with pytest.raises(ConfigError, match="0 to 2 of 3"):
        symmetric_skip(3, 3)
