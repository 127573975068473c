"""Drafts that are handed on: exact; refused where they cannot fit, with a warning elsewhere."""

import json
import warnings

import jax
import numpy as np
import pytest

import s3d_jax
from s3d_jax.commands.main import main
from s3d_jax.drafters.portable import add_draft, export_draft
from s3d_jax.drafters.stored import draft_names, read_draft, save_draft
from s3d_jax.errors import CheckpointError, ConfigError
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.storage import native as checkpoint
from tests.sampled import sampled
from tests.tiny import tiny_config, tiny_params
from tests.train.test_objective import noisy_draft

DRAFT = DraftConfig((False, True, True, False), 3)


def save_model(folder, seed=0, **changes):
    config = tiny_config(**changes)
    return checkpoint.save(folder, config, tiny_params(config, seed))


def save_noisy_draft(model):
    loaded = checkpoint.load(model)
    params = noisy_draft(loaded.config, loaded.params, DRAFT, chain_rank=5, recall=2)
    params = params.replace(vocabulary=np.arange(2, 30, dtype=np.int32))
    save_draft(model, "good", DRAFT, params, {"steps": 7})


@pytest.fixture
def model(tmp_path):
    """A model with a draft, which has been exported."""
    folder = save_model(tmp_path / "model")
    loaded = checkpoint.load(folder)
    save_draft(
        folder, "good", DRAFT, noisy_draft(loaded.config, loaded.params, DRAFT), {"steps": 7}
    )
    export_draft(folder, "good", tmp_path / "alone")
    return folder


@pytest.mark.parametrize("dtype", sampled(["float32", "bfloat16"], ["bfloat16"]))
def test_a_draft_comes_back_exactly(tmp_path, dtype):
    model = save_model(tmp_path / "model", dtype=dtype)
    save_noisy_draft(model)
    assert main(["draft", "export", "good", str(tmp_path / "alone"), "--model", str(model)]) == 0
    other = save_model(tmp_path / "other", dtype=dtype)  # the same weights
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["draft", "add", str(tmp_path / "alone"), "--model", str(other)]) == 0
    config = tiny_config(dtype=dtype)
    before, after = read_draft(model, "good", config), read_draft(other, "default", config)
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    assert after.config == before.config
    assert after.training == {"steps": 7, "target_crc32": checkpoint.weights_checksum(model)}
    prompt = [1, 2, 3]
    texts = [s3d_jax.load(m).generate(prompt, max_new_tokens=20)[0].tokens for m in (model, other)]
    assert texts[0] == texts[1]


def test_fewer_draft_tokens_can_be_handed_on(model, tmp_path, capsys):
    draft = read_draft(model, "good", tiny_config())
    reached = {"tokens_per_iteration": 1.75, "acceptance_per_position": [0.5, 0.25, 0.0]}
    training = {"reached": reached}
    save_draft(model, "good", draft.config, draft.params, training, overwrite=True)
    out = tmp_path / "fewer"
    assert main(["draft", "export", "good", str(out), "--model", str(model), "--gamma", "2"]) == 0
    assert "γ = 2" in capsys.readouterr().out
    add_draft(out, model, "fewer")
    whole, fewer = (read_draft(model, name, tiny_config()) for name in ("good", "fewer"))
    assert (whole.config, fewer.config) == (DRAFT, DRAFT.replace(gamma=2))
    jax.tree.map(np.testing.assert_array_equal, whole.params, fewer.params)
    stats = s3d_jax.load(model, draft="fewer").generate([1, 2, 3], max_new_tokens=8)[0].stats
    assert len(stats.accepted_per_position) == 2
    assert main(["info", "--model", str(model)]) == 0
    shown = capsys.readouterr().out
    assert "1.75 tokens per iteration when trained\n" in shown  # of "good"
    assert "1.75 tokens per iteration when trained with gamma 3\n" in shown
    for gamma, message in ((0, ">= 1"), (4, "proposes 3 tokens: choose 1 to 3")):
        with pytest.raises(ConfigError, match=message):
            export_draft(model, "good", tmp_path / "none", gamma=gamma)
        assert not (tmp_path / "none").exists()


def test_other_weights_are_warned_of(model, tmp_path):
    other = save_model(tmp_path / "other", seed=1, max_position_embeddings=64)
    with pytest.warns(UserWarning, match="trained for other weights .* may be accepted"):
        add_draft(tmp_path / "alone", other, "given")
    assert draft_names(other) == ("given",)
    half = save_model(tmp_path / "half", dtype="bfloat16")
    with pytest.warns(UserWarning, match="trained for other weights"):
        add_draft(tmp_path / "alone", half)
    stored = read_draft(half, "default", tiny_config(dtype="bfloat16"))
    assert stored.params.mask_embeddings.dtype == "bfloat16"


def test_settings_that_differ_by_rounding_are_the_same(model, tmp_path):
    """A GGUF file holds 1e-5 in float32, and readers make two numbers of it."""
    other = save_model(tmp_path / "other", norm_eps=float(np.float32(tiny_config().norm_eps)))
    add_draft(tmp_path / "alone", other)
    assert draft_names(other) == ("default",)


def test_another_architecture_is_refused(model, tmp_path):
    other = save_model(tmp_path / "other", intermediate_size=44, qkv_bias=True)
    with pytest.raises(CheckpointError, match="another architecture") as caught:
        add_draft(tmp_path / "alone", other)
    assert "intermediate_size: the draft's model has 40, this one 44" in str(caught.value)
    assert "qkv_bias: the draft's model has False, this one True" in str(caught.value)
    assert draft_names(other) == ()


def test_what_cannot_be_added_is_named(model, tmp_path):
    alone, other = tmp_path / "alone", save_model(tmp_path / "other")

    def refused(message, **options):
        with pytest.raises(CheckpointError, match=message):
            add_draft(alone, other, **options)
        assert draft_names(other) == ()

    refused("cannot be the name of a draft", name="a/b")
    config = json.loads((alone / "config.json").read_text())
    for field, value, message in (
        ("kind", "hydra", "kind 'hydra', which this s3d_jax does not know: update"),
        ("version", 4, "version 4"),
        ("format", "s3d_jax draft", "holds no draft"),
        ("draft", {"skip": 3}, "config.json is damaged"),
        ("target", None, "config.json is damaged"),
    ):
        (alone / "config.json").write_text(json.dumps(config | {field: value}))
        refused(message)
    (alone / "config.json").write_text(json.dumps(config))
    weights = alone / "draft.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("draft.safetensors is damaged")
    weights.write_bytes(whole[:50])
    refused("cannot read .*draft.safetensors")
    weights.write_bytes(whole)
    add_draft(alone, other)
    with pytest.raises(CheckpointError, match="exists"):
        add_draft(alone, other)
    add_draft(alone, other, overwrite=True)
    with pytest.raises(CheckpointError, match="exists"):
        export_draft(model, "good", alone)
    with pytest.raises(CheckpointError, match="holds no draft"):
        add_draft(tmp_path / "nowhere", other)
