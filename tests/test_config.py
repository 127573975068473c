"""Settings are checked when they are made, and survive JSON."""

import json

import pytest

from s3d_jax.config import DraftConfig, ModelConfig, RopeConfig, SamplingConfig, symmetric_skip
from s3d_jax.errors import ConfigError
from tests.tiny import tiny_config


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
        ({"type": "linear", "factor": -1}, "factor"),
        ({"rotary_fraction": 1.5}, "rotary_fraction"),
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
        ({"skip": (True, True)}, "keeps no layer"),
        ({"skip": (True, 0)}, "True and False"),
        ({"skip": (True, False), "gamma": 0}, "gamma must be an integer >= 1, got 0"),
        ({"skip": (True, False), "gamma": 2.5}, "2.5"),
        ({"skip": (True, False), "block_attention": "both"}, "both"),
    ],
)
def test_draft_config_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        DraftConfig(**fields)


def test_a_draft_must_fit_its_model():
    with pytest.raises(ConfigError, match="2 entries, the model has 4 layers"):
        DraftConfig((True, False)).validate_for(tiny_config())


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("inf")},
        {"logit_bias": ((-1, 1.0),)},
        {"logit_bias": ((1, float("inf")),)},
    ],
)
def test_sampling_config_refuses(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        SamplingConfig(**fields)


def test_json_round_trip():
    config = tiny_config(
        rope=RopeConfig("linear", factor=2.0), sliding_window=(3, None, 3, None), qk_norm=True
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
