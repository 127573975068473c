"""Drafts that read hidden states: exact for any weights, and in decoding as in training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s3d_jax
from s3d_jax.commands import main as cli
from s3d_jax.drafters.portable import add_draft, export_draft
from s3d_jax.drafters.stored import StoredFeatures, read_draft, save_draft
from s3d_jax.engine.batch import Batch
from s3d_jax.errors import CheckpointError, ConfigError
from s3d_jax.nn.features import (
    FeatureDraft,
    eagle_targets,
    feature_stream,
    in_memory,
    new_weights,
)
from s3d_jax.nn.streams import text_states
from s3d_jax.settings.drafting import FeatureConfig
from s3d_jax.settings.training import LoopConfig, ObjectiveConfig, OptimizerConfig, TrainDraftConfig
from s3d_jax.storage import native
from s3d_jax.train.beginning import beginning_of_features
from s3d_jax.train.bridges import fitted_fuse
from s3d_jax.train.features import FeatureTask
from s3d_jax.train.loop import begin, make_step
from s3d_jax.weights.trees import store_tree
from tests.tiny import tiny_config, tiny_lm, tiny_params

KINDS = ("eagle", "medusa")
PROMPTS = [[3], [5, 9, 2], list(range(1, 18)), [7] * 40]
NEW = 24
FEW = (4, 11, 20)  # tokens; among so few a random draft is often right


def random_draft(kind, config, params, gamma=3, seed=0, vocabulary=None) -> FeatureDraft:
    """Far from what training begins with."""
    key = jax.random.key(seed)
    weights = new_weights(kind, config, params, gamma, key)
    noisy = jax.tree.map(lambda x: x + 0.5 * jax.random.normal(key, x.shape), weights)
    vocabulary = None if vocabulary is None else jnp.asarray(vocabulary, jnp.int32)
    return FeatureDraft(noisy, vocabulary)


def with_drafts(lm, gamma=3, **options):
    lm.feature_drafts = {
        kind: (
            FeatureConfig(gamma),
            in_memory(
                lm.config, lm.params, random_draft(kind, lm.config, lm.params, gamma, **options)
            ),
        )
        for kind in KINDS
    }
    return lm


@pytest.fixture(scope="module")
def lm():
    return with_drafts(tiny_lm())


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_plain_decoding(lm, kind):
    for options in (
        {},
        dict(temperature=0.9, top_p=0.9, seed=3),
        dict(frequency_penalty=1.5, logit_bias={4: 2.0}),
    ):
        options = dict(options, max_new_tokens=NEW)
        truth = [r.tokens for r in lm.generate(PROMPTS, method="ar", **options)]
        results = lm.generate(PROMPTS, method=kind, **options)
        assert [r.tokens for r in results] == truth
        assert all(r.stats.drafted == 3 * r.stats.iterations for r in results)
    many = lm.generate_many(PROMPTS, rows=2, method=kind, **options)
    assert [r.tokens for _, r in sorted(many, key=lambda found: found[0])] == truth
    stream = lm.stream_tokens(PROMPTS[2], method=kind, gamma=2, **options)
    assert sum(stream, []) == truth[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [dict(sliding_window=(5, None, 5, None)), dict(tie_embeddings=True, embedding_scale=5.0)],
    ids=["windows", "tied"],
)
@pytest.mark.parametrize("pruned", [None, FEW], ids=["all", "few"])
def test_training_knows_what_decoding_will_accept(kind, changes, pruned):
    """Each iteration accepts the tokens that the training stream has right at its place."""
    lm = with_drafts(tiny_lm(**changes), vocabulary=pruned)
    bias = {token: 100.0 for token in FEW}
    options = dict(max_new_tokens=NEW, method=kind, logit_bias=bias)
    batch = Batch(lm.engine, [np.asarray(p, np.int32) for p in PROMPTS], **options)
    list(batch.run())
    assert batch._state is not None
    passes, right_at_once = np.asarray(batch._state.passes), 0
    stream = jax.jit(feature_stream, static_argnames=("kind", "config", "gamma"))
    for b, (prompt, result) in enumerate(zip(PROMPTS, batch.results(), strict=True)):
        assert set(result.tokens) <= set(FEW)
        text = jnp.asarray([prompt + result.tokens])
        (starts,) = np.nonzero(passes[b, : text.shape[1]])
        anchors = jnp.asarray(starts - 1)[None]
        hidden, _ = text_states(lm.config, lm.params, text, text.shape[1])
        config, draft = lm.feature_drafts[kind]
        q = stream(kind, lm.config, lm.params, config.gamma, draft, text, anchors, hidden)[
            0
        ].reshape(len(starts), 3, -1)
        if pruned is None:
            q = q + jnp.zeros(31).at[jnp.asarray(FEW)].set(100.0)
        drafted = np.asarray(draft.ids(jnp.argmax(q, axis=-1)))
        for start, tokens in zip(starts[:-1], drafted[:-1], strict=True):  # the last one was cut
            following = np.asarray(text[0, start : start + 3])
            right = int(np.cumprod(tokens[: len(following)] == following).sum())
            assert passes[b, start] == 1 + right
            right_at_once += right
    assert right_at_once > 10


def test_on_int8_weights_the_text_stays_and_the_draft_is_int8_too():
    float_lm = tiny_lm(num_layers=2, vocab_size=64, hidden_size=32, intermediate_size=64)
    config = float_lm.config.replace(quantization="int8")
    params = jax.device_put(store_tree(config, jax.device_get(float_lm.params)))
    lm = with_drafts(s3d_jax.LM(config, params))
    truth = [r.tokens for r in lm.generate(PROMPTS, max_new_tokens=NEW, method="ar")]
    for kind in KINDS:
        results = lm.generate(PROMPTS, max_new_tokens=NEW, method=kind)
        assert [r.tokens for r in results] == truth
    kinds = {x.dtype for x in jax.tree.leaves(lm.feature_drafts["eagle"][1].weights["fuse"])}
    assert jnp.dtype("int8") in kinds


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_learns(kind):
    """On texts that count, of which the target knows nothing."""
    config = tiny_config(tie_embeddings=True)
    params = tiny_params(config)
    task = FeatureTask(
        kind,
        config,
        params,
        FeatureConfig(2),
        objective=ObjectiveConfig(objective="ce", anchors=8),
    )
    loop = LoopConfig(OptimizerConfig(steps=60, learning_rate=0.01, warmup_steps=5), batch_size=8)
    state, step = begin(task, loop), make_step(task, loop)
    losses = []
    for i in range(60):
        first = np.random.default_rng(i).integers(0, 31, (8, 1))
        tokens = (first + 3 * np.arange(24)) % 31
        batch = {"tokens": tokens, "learn": np.ones_like(tokens, bool)}
        state, metrics = step(state, task.frozen, batch)
        losses.append(float(metrics["draft_loss"]))
    # What one layer can make of a random model's hidden states.
    assert losses[-1] < (0.5 if kind == "eagle" else 0.87) * losses[0]


def test_the_fit_is_the_best_linear_one():
    """On the very rows nothing linear comes closer to what the last layer is given."""
    config = tiny_config()
    params = tiny_params(config)
    rows = {
        "tokens": np.random.default_rng(0).integers(0, 31, (4, 64)).astype(np.int32),
        "learn": np.ones((4, 64), bool),
    }
    found = fitted_fuse(config, params, lambda i: rows, 1)
    x, y = (np.asarray(a, np.float64) for a in eagle_targets(config, params, rows["tokens"]))
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    errors = [np.mean((y - x @ matrix) ** 2) for matrix in (best, found.T, np.zeros_like(best))]
    assert errors[0] <= errors[1] < 1.01 * errors[0] < 0.9 * errors[2]


@pytest.fixture
def checkpoint(tmp_path):
    config = tiny_config()
    with native.checkpoint_writer(tmp_path / "model", config) as writer:
        for group, tree in tiny_params(config).items():
            writer.write_group(group, tree)
    return tmp_path / "model"


def test_stored_drafts_are_found_by_their_kind(checkpoint, tmp_path, capsys):
    lm = s3d_jax.load(checkpoint)
    with pytest.raises(ConfigError, match="s3d train --kind eagle"):
        lm.generate([1], method="eagle")
    saved = {}
    for kind in KINDS:
        saved[kind] = random_draft(kind, lm.config, lm.params, vocabulary=FEW)
        save_draft(checkpoint, kind, FeatureConfig(3), saved[kind], {}, kind=kind)
    lm = s3d_jax.load(checkpoint)
    assert lm.draft_config.gamma == 4  # of an untrained S3D draft: these are none
    assert sorted(lm.feature_drafts) == sorted(KINDS)
    truth = lm.generate(PROMPTS[2], max_new_tokens=NEW, method="ar")[0].tokens
    for kind in KINDS:
        result = lm.generate(PROMPTS[2], max_new_tokens=NEW, method=kind)[0]
        assert result.tokens == truth
        config, draft = lm.feature_drafts[kind]
        assert config == FeatureConfig(3) and draft.head
        jax.tree.map(np.testing.assert_array_equal, draft.weights, saved[kind].weights)
    with pytest.raises(ConfigError, match="3 heads, and gamma is 4"):
        lm.generate([1], method="medusa", gamma=4)
    # By name it is chosen for its kind, and S3D keeps its own.
    other = random_draft("eagle", lm.config, lm.params, seed=1)
    save_draft(checkpoint, "b", FeatureConfig(2), other, {}, kind="eagle")
    assert s3d_jax.load(checkpoint).feature_drafts["eagle"][0].gamma == 3
    lm = s3d_jax.load(checkpoint, draft="b")
    assert (lm.feature_drafts["eagle"][0].gamma, lm.draft_config.gamma) == (2, 4)
    # No kind takes the place where another is looked for.
    for name, kind in (("default", "eagle"), ("eagle", "medusa"), ("medusa", "s3d")):
        with pytest.raises(CheckpointError, match=f"the name '{name}' is for drafts of the kind"):
            save_draft(checkpoint, name, FeatureConfig(2), other, {}, kind=kind)
    # Another name, and a copy that was handed on.
    exported = export_draft(checkpoint, "medusa", tmp_path / "out")
    assert exported.kind == "medusa"
    export_draft(checkpoint, "medusa", tmp_path / "fewer", gamma=2)
    add_draft(tmp_path / "fewer", checkpoint, "fewer")
    result = s3d_jax.load(checkpoint, draft="fewer").generate([1], method="medusa")[0]
    assert len(result.stats.accepted_per_position) == 2
    training = TrainDraftConfig(kind="medusa", start="fewer", draft=FeatureConfig(3))
    assert beginning_of_features(checkpoint, lm.config, training)[0].gamma == 3  # all are left
    with pytest.raises(ConfigError, match="has 3 heads"):
        fewer = dataclasses.replace(training, draft=FeatureConfig(2))
        beginning_of_features(checkpoint, lm.config, fewer)
    add_draft(tmp_path / "out", checkpoint, "other")
    assert read_draft(checkpoint, "other", lm.config).kind == "medusa"
    assert add_draft(tmp_path / "out", checkpoint, overwrite=True).name == "medusa"
    again = StoredFeatures(checkpoint, lm.config, lm.params)
    assert again["medusa"][0] == FeatureConfig(3)  # the one that is called so
    cli.main(["info", "--model", str(checkpoint)])
    shown = capsys.readouterr().out
    assert "eagle: of the kind 'eagle', gamma 3" in shown and "drafts 3 tokens" in shown
