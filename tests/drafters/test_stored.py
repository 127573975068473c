"""Trained drafts in a checkpoint are stored exactly, chosen by name, and appear whole."""

import json

import jax
import numpy as np
import pytest

import s3d_jax
from s3d_jax.commands.main import main
from s3d_jax.drafters import stored as drafts
from s3d_jax.drafters.stored import choose_draft, draft_names, read_draft, save_draft
from s3d_jax.errors import CheckpointError, ConfigError
from s3d_jax.nn.draft import DraftParams
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.storage import native as checkpoint
from tests.tiny import tiny_config, tiny_params
from tests.train.test_objective import noisy_draft

DRAFT = DraftConfig((False, True, True, False), 3, "bidirectional")


@pytest.fixture
def model(tmp_path):
    config = tiny_config()
    return checkpoint.save(tmp_path / "model", config, tiny_params(config))


def draft_of(model) -> DraftParams:
    loaded = checkpoint.load(model)
    return noisy_draft(loaded.config, loaded.params, DRAFT)


def test_a_draft_comes_back_exactly(model):
    params = draft_of(model)
    save_draft(model, "default", DRAFT, params, {"steps": 7})
    stored = read_draft(model, "default", tiny_config())
    assert (stored.config, stored.training) == (DRAFT, {"steps": 7})
    jax.tree.map(np.testing.assert_array_equal, stored.params, params)
    assert stored.num_params == sum(x.size for x in jax.tree.leaves(params))
    settings = read_draft(model, "default", tiny_config(), weights=False)
    assert settings.params is None and settings.num_params == stored.num_params


def test_masks_alone_are_a_draft(model):
    params = DraftParams(mask_embeddings=draft_of(model).mask_embeddings)
    save_draft(model, "masks", DRAFT, params, {})
    stored = read_draft(model, "masks", tiny_config()).params
    assert stored is not None and stored.deltas == {} and stored.bridges == {}


def test_a_draft_with_merged_deltas_is_refused(model):
    params = draft_of(model)
    save_draft(model, "default", DRAFT, params, {})
    merged = s3d_jax.load(model).draft_params
    assert merged.layers and not merged.deltas
    with pytest.raises(CheckpointError, match=r"merged into its layers.*read_draft"):
        save_draft(model, "default", DRAFT, merged, {}, overwrite=True)
    jax.tree.map(
        np.testing.assert_array_equal, read_draft(model, "default", tiny_config()).params, params
    )


def test_loading_uses_the_default_and_keeps_the_output(model):
    plain = s3d_jax.load(model).generate([5, 6, 7], max_new_tokens=30, method="ar")[0]
    save_draft(model, "default", DRAFT, draft_of(model), {})
    save_draft(model, "other", DRAFT.replace(gamma=5), draft_of(model), {})
    lm = s3d_jax.load(model)
    assert lm.draft_config == DRAFT and lm.draft_params.bridges
    assert lm.generate([5, 6, 7], max_new_tokens=30)[0].tokens == plain.tokens
    assert s3d_jax.load(model, draft="other").draft_config.gamma == 5
    untrained = s3d_jax.load(model, use_draft=False)
    assert untrained.draft_config.gamma == 4 and not untrained.draft_params.bridges
    half = s3d_jax.load(model, dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(half.draft_params)} == {"bfloat16"}


def test_a_draft_of_merged_mode_keeps_its_deltas(model, capsys):
    """Its pass needs the layers with and without them. Files of two passes are as before."""
    settings = DraftConfig((False,) * 4, 2, mode="merged")
    loaded = checkpoint.load(model)
    params = noisy_draft(loaded.config, loaded.params, settings, chain_rank=2)
    assert params.mask_embeddings.shape[0] == 2
    save_draft(model, "default", settings, params, {})
    lm = s3d_jax.load(model)
    assert lm.draft_config == settings and lm.draft_params.deltas and not lm.draft_params.layers
    save_draft(model, "other", DRAFT, draft_of(model), {})
    modes = [
        json.loads((model / f"drafts/{name}/config.json").read_text())["draft"].get("mode")
        for name in ("default", "other")
    ]
    assert modes == ["merged", None]
    assert read_draft(model, "other", tiny_config(), weights=False).config == DRAFT
    assert main(["info", "--model", str(model)]) == 0
    assert "layers [0, 1, 2, 3] of 4, gamma 2" in (printed := capsys.readouterr().out)
    assert printed.count("parameters, merged, chain of rank 2") == 1
    assert main(["info", "--model", str(model), "--json"]) == 0
    drafts = json.loads(capsys.readouterr().out)["drafts"]
    assert {name: d["draft_mode"] for name, d in drafts.items()} == {
        "default": "merged",
        "other": "two-pass",
    }


def test_which_draft_is_chosen(model):
    assert choose_draft(model, None) is None
    with pytest.raises(CheckpointError, match="no draft 'a': it has no trained draft"):
        choose_draft(model, "a")
    save_draft(model, "a", DRAFT, draft_of(model), {})
    assert choose_draft(model, None) == "a"
    save_draft(model, "b", DRAFT, draft_of(model), {})
    with pytest.raises(CheckpointError, match="drafts a, b, and none is called 'default'"):
        s3d_jax.load(model)
    assert choose_draft(model, "b") == "b"
    with pytest.raises(CheckpointError, match="no draft 'c': it has a, b"):
        choose_draft(model, "c")


def test_a_draft_is_replaced_only_on_demand(model):
    save_draft(model, "a", DRAFT, draft_of(model), {"first": 1})
    with pytest.raises(CheckpointError, match="exists"):
        save_draft(model, "a", DRAFT, draft_of(model), {})
    save_draft(model, "a", DRAFT, draft_of(model), {"second": 1}, overwrite=True)
    assert read_draft(model, "a", tiny_config(), weights=False).training == {"second": 1}
    assert [p.name for p in (model / "drafts").iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "-a", "a.partial-12"])
def test_invalid_names(model, name):
    with pytest.raises(CheckpointError, match="cannot be the name"):
        save_draft(model, name, DRAFT, draft_of(model), {})
    assert draft_names(model) == ()


def test_damage_is_noticed(model):
    params = draft_of(model)
    folder = save_draft(model, "a", DRAFT, params, {})
    data = max((folder / "weights" / "d").iterdir(), key=lambda file: file.stat().st_size)
    raw = bytearray(data.read_bytes())
    raw[raw.index(np.asarray(params.mask_embeddings).tobytes()) + 5] ^= 1
    data.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"mask_embeddings in .* is damaged: train it again"):
        read_draft(model, "a", tiny_config())
    (folder / "config.json").write_text('{"format": "s3d_jax draft", "version": 9}')
    with pytest.raises(CheckpointError, match="format version 4"):
        read_draft(model, "a", tiny_config())
    (folder / "config.json").write_text('{"format": "s3d_jax draft", "version": 1}')
    with pytest.raises(CheckpointError, match="damaged"):
        read_draft(model, "a", tiny_config())


def test_a_stored_draft_has_a_kind(model, capsys):
    folder = save_draft(model, "a", DRAFT, draft_of(model), {})
    fields = json.loads((folder / "config.json").read_text())
    assert fields["kind"] == read_draft(model, "a", tiny_config()).kind == "s3d"
    del fields["kind"]
    (folder / "config.json").write_text(json.dumps(fields | {"version": 1}))
    assert read_draft(model, "a", tiny_config()).kind == "s3d"
    (folder / "config.json").write_text(json.dumps(fields | {"kind": "hydra"}))
    with pytest.raises(CheckpointError, match=r"'a' of .* the kind 'hydra', and this s3d_jax"):
        s3d_jax.load(model)
    assert main(["info", "--model", str(model)]) == 0
    assert "a: of the kind 'hydra', which is not known here" in capsys.readouterr().out
    s3d_jax.load(model, use_draft=False)


def test_a_draft_of_another_model_is_refused(model):
    save_draft(model, "a", DRAFT, draft_of(model), {})
    with pytest.raises(CheckpointError, match="skip has 4 entries, the model has 6"):
        read_draft(model, "a", tiny_config(num_layers=6))
    with pytest.raises(ConfigError, match="skip has 2 entries"):
        save_draft(model, "b", DraftConfig((True, False)), draft_of(model), {})


@pytest.mark.parametrize(
    "vocabulary", [[3, 2], [4, 4], [-1, 5], [0, 31], [[1, 2]]], ids=lambda ids: str(ids)
)
def test_a_vocabulary_holds_ascending_ids_of_the_model(model, vocabulary, monkeypatch):
    wrong = draft_of(model).replace(vocabulary=np.array(vocabulary, np.int32))
    with pytest.raises(CheckpointError, match="ascending ids of the model's 31 tokens"):
        save_draft(model, "default", DRAFT, wrong, {})
    assert draft_names(model) == ()
    with monkeypatch.context() as patch:
        patch.setattr(drafts, "check_vocabulary", lambda *_: None)
        save_draft(model, "default", DRAFT, wrong, {})
    with pytest.raises(CheckpointError, match="ascending ids of the model's 31 tokens"):
        read_draft(model, "default", tiny_config())


def test_a_chain_and_a_vocabulary_come_back_and_are_shown(model, capsys):
    loaded = checkpoint.load(model)
    params = noisy_draft(loaded.config, loaded.params, DRAFT, chain_rank=6, recall=2)
    params = params.replace(vocabulary=np.array([2, 3, 5, 30], np.int32))
    save_draft(model, "default", DRAFT, params, {})
    stored = read_draft(model, "default", tiny_config())
    jax.tree.map(np.testing.assert_array_equal, stored.params, params)
    assert stored.params.vocabulary.dtype == np.int32
    floats = sum(x.size for x in jax.tree.leaves(params)) - 4
    assert stored.num_params == floats
    assert main(["info", "--model", str(model)]) == 0
    described = f"{floats:,} parameters, drafts 4 tokens, chain of rank 6, recalls 2 layers"
    assert described in capsys.readouterr().out
    lm = s3d_jax.load(model)
    assert lm.draft_params.head[0].shape == (4, 24)
    assert s3d_jax.load(model, dtype="bfloat16").draft_params.vocabulary.dtype == np.int32
    options = dict(max_new_tokens=20)
    ours = lm.generate([5, 6, 7], **options)[0].tokens
    assert ours == lm.generate([5, 6, 7], method="ar", **options)[0].tokens
