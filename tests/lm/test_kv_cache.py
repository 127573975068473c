"""With an int8 cache every way to run texts gives the tokens of plain decoding, bit for bit.

The models have int8 weights too, so that their sums are exact: a token's keys and values are the
same numbers whichever pass wrote them.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s3d_jax
from s3d_jax.commands.main import main
from s3d_jax.decoding import sizes
from s3d_jax.engine.batch import Batch
from s3d_jax.engine.ledger import ledger, plan_of
from s3d_jax.errors import ConfigError, DeviceError
from s3d_jax.lm import LM
from s3d_jax.nn.cache import cache_bytes
from s3d_jax.nn.transformer import forward_logits
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import ModelConfig, RopeConfig
from s3d_jax.weights.base import num_bytes
from tests.engine.test_longrope import ROPE
from tests.sampled import sampled
from tests.tiny import tiny_lm
from tests.train.test_objective import noisy_draft
from tests.weights.test_int8 import quantized

WINDOWS = (5, None, 5, None)
FAMILIES = {
    "one head per key": dict(num_heads=3, num_kv_heads=3),
    "mistral": dict(sliding_window=(5,) * 4, num_kv_heads=1),
    "gemma2": dict(
        sliding_window=WINDOWS,
        local_rope=RopeConfig(theta=100.0),  # of gemma3, as the next
        qk_norm=True,
        post_norms=True,
        norm_offset=1.0,
        embedding_scale=5.0,
        attention_softcap=20.0,
        logit_softcap=10.0,
    ),
    "phi3": dict(rope=ROPE, num_kv_heads=6),  # prefilled again after 20 tokens
}
SAMPLED = dict(temperature=0.9, top_p=0.95, seed=3)
PROMPTS = [[1, 2, 3], [5], list(range(19)), [9, 8, 7, 6]]


def model(**changes) -> LM:
    """A tiny model in int8, cache and weights, with a draft that recalls cached values."""
    config, params, stored, whole = quantized(changes)
    draft = DraftConfig((False, True, False, False), 3)
    stored = stored.replace(kv_cache="int8")
    trained = noisy_draft(config, params, draft, recall=2)
    return LM(stored, whole, draft_config=draft, draft_params=trained)


def tokens(results) -> list[list[int]]:
    return [result.tokens for result in results]


@pytest.mark.parametrize("changes", sampled(FAMILIES, ["gemma2", "phi3"]))
def test_all_ways_give_the_tokens_of_plain_decoding(changes, monkeypatch):
    """Batches, queues, streams and kept caches; prompts of several chunks; rings that wrap."""
    monkeypatch.setattr(sizes, "PREFILL_BUCKETS", (4, 8))  # rings of 5 + 8 slots
    lm = model(**changes)
    # Without a penalty some of these models repeat one token.
    common = dict(max_new_tokens=40, frequency_penalty=1.5)
    options = dict(adaptive=False, **common)
    plain = tokens(lm.generate(PROMPTS, method="ar", **common))
    assert all(len(set(row)) > 3 for row in plain)
    drafted = lm.generate(PROMPTS, **options)
    assert tokens(drafted) == plain
    assert sum(r.stats.accepted for r in drafted) > 0
    found = dict(lm.generate_many(PROMPTS, rows=2, **options))
    assert [found[i].tokens for i in range(len(PROMPTS))] == plain
    assert sum(lm.stream_tokens(PROMPTS[2], **options), []) == plain[2]
    drawn = tokens(lm.generate(PROMPTS, **options, **SAMPLED))
    assert drawn == tokens(lm.generate(PROMPTS, method="ar", **common, **SAMPLED)) != plain

    # A turn that continues in a kept cache, which grows.
    first = Batch(lm.engine, [np.asarray(PROMPTS[0], np.int32)], to_keep=True, **options)
    list(first.run())
    longer = [*PROMPTS[0], *first.tokens[0], 4, 4]
    second = Batch(lm.engine, [np.asarray(longer, np.int32)], first.kept(), **options)
    list(second.run())
    assert second.results()[0].stats.cached_tokens == 42
    assert second.tokens == tokens(lm.generate([longer], **options))


def test_a_second_model_has_its_own_kind_of_cache():
    lm, plain = model(), None
    for kind in ("int8", None):
        other = model()
        other.config = other.config.replace(kv_cache=kind)
        lm.draft_model = other
        batch = Batch(lm.engine, [np.asarray(PROMPTS[2], np.int32)], method="two-model")
        assert (batch._state.drafter_state.kind, batch._state.cache.kind) == (kind, "int8")
        list(batch.run())
        plain = plain or tokens(lm.generate([PROMPTS[2]], method="ar"))
        assert batch.tokens == plain
        drafting = batch.results()[0].stats
        assert drafting.accepted >= (drafting.drafted if kind else 1) - 4  # the last block is cut


def test_a_kept_cache_of_another_kind_is_not_taken():
    lm, prompt = model(), np.asarray(PROMPTS[2], np.int32)
    for kind in ("int8", None):
        lm.config = lm.config.replace(kv_cache=kind)
        before = Batch(lm.engine, [prompt], max_new_tokens=9)
        list(before.run())
        longer = np.asarray([*prompt, *before.tokens[0], 4], np.int32)
        for now, known in (("int8" if kind is None else None, 0), (kind, 27)):
            lm.config = lm.config.replace(kv_cache=now)
            after = Batch(lm.engine, [longer], before.kept(), max_new_tokens=9)
            assert (after._known, after._state.cache.kind) == (known, now)


# --- the shipped model ----------------------------------------------------------------------------

TEXTS = [
    "Once upon a time",
    "The",
    "Lily and Tom went to the park. They",
    "One day, a girl named Mia",
]


@pytest.fixture(scope="module")
def shipped() -> LM:
    return s3d_jax.load(kv_cache="int8")


def test_the_shipped_model_s_samples_are_those_of_plain_decoding(shipped):
    """Its greedy texts are in tests/storage/test_embedded.py."""
    plain = shipped.generate(TEXTS, method="ar", max_new_tokens=120, **SAMPLED)
    drafted = shipped.generate(TEXTS, max_new_tokens=120, adaptive=False, **SAMPLED)
    assert tokens(drafted) == tokens(plain)
    assert np.mean([r.stats.tokens_per_iteration for r in drafted]) > 1.8


def test_a_conversation_is_the_chat_of_its_messages(shipped):
    talk = shipped.conversation(max_new_tokens=40)
    talk.send("I want to book a table.")
    messages = [*talk.messages, {"role": "user", "content": "For four people, please."}]
    answer = talk.send("For four people, please.")
    assert answer.tokens == shipped.chat(messages, max_new_tokens=40).tokens
    assert answer.stats.cached_tokens > 15


def test_the_shipped_model_s_logits_are_near_those_of_a_float_cache(shipped):
    texts = shipped.generate(TEXTS[:3] * 2, max_new_tokens=120, **SAMPLED, eos_token_ids=())
    ids = jnp.asarray([result.tokens for result in texts])
    config = shipped.config
    p, q = (
        jax.nn.log_softmax(forward_logits(config.replace(kv_cache=kind), shipped.params, ids))
        for kind in (None, "int8")
    )
    divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    assert 1e-8 < float(jnp.mean(divergence)) < 1e-3
    assert float(jnp.mean(p.argmax(-1) == q.argmax(-1))) > 0.97


# --- memory, options, files -----------------------------------------------------------------------


def test_ledger_batch_and_info_say_what_the_arrays_hold(shipped, capsys):
    config = shipped.config
    head = config.head_dim + 4  # a byte for each number, and a float32 scale
    per_token = 2 * config.num_layers * config.num_kv_heads * head
    assert cache_bytes(config, 1, None) == per_token
    prompts = [np.ones(200, np.int32)] * 3
    batch = Batch(shipped.engine, prompts, max_new_tokens=200, method="ar")
    held = num_bytes((batch._state.cache.keys, batch._state.cache.values))
    plan = plan_of(400, 3, 0, shipped.max_length)
    assert held == plan.cache_bytes(config) == 3 * plan.slots * per_token
    slots = 3 * plan.slots * 8  # tokens and passes
    assert ledger(config, plan, None, 0).cache == held + slots == batch._cache_bytes(plan)
    weights = num_bytes(shipped.params)
    assert batch.nbytes == weights + held

    assert main(["info", "--kv-cache", "int8", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kv_cache"], facts["cache_bytes_per_token"]) == ("int8", per_token)
    assert "kv_cache" not in facts["config"]
    context = config.max_position_embeddings
    assert facts["cache_bytes_of_full_row"] == cache_bytes(config, context, 512)
    assert main(["info", "--kv-cache", "int8"]) == 0
    assert f"{per_token / 1024:,.1f} KiB per token" in (said := capsys.readouterr().out)
    assert f"for a row of {context} tokens, in int8" in said


def test_a_lack_of_memory_names_the_kind_of_cache(monkeypatch):
    def nothing_left(needed, what, less):
        raise DeviceError(f"{what} more; {less}")

    monkeypatch.setattr("s3d_jax.engine.runner.check_memory", nothing_left)
    for kind in (None, "int8"):
        lm = tiny_lm(kv_cache=kind)
        with pytest.raises(DeviceError) as error:
            lm.generate([1, 2])
        assert ("kv_cache='int8' (--kv-cache int8)" in str(error.value)) == (kind is None)


@pytest.mark.parametrize("kind", ["int4", "float32", 8, True])
def test_other_kinds_are_refused_before_anything_is_loaded(kind, monkeypatch):
    monkeypatch.setattr("s3d_jax.storage.native.load", None)
    with pytest.raises(ConfigError, match=r"kv_cache \(--kv-cache\) must be None or one of"):
        s3d_jax.load(kv_cache=kind)
    with pytest.raises(ConfigError, match=r"kv_cache .* must be None or one of \('int8',\)"):
        tiny_lm(kv_cache=kind)


def test_commands_take_it_and_refuse_others(capsys):
    command = ["generate", "Once upon", "--max-new-tokens", "8", "--kv-cache"]
    assert main([*command, "int8"]) == 0
    assert capsys.readouterr().out.startswith("Once upon")
    with pytest.raises(SystemExit):
        main([*command, "fp8"])
    assert "invalid choice: 'fp8'" in capsys.readouterr().err


def test_checkpoints_know_nothing_of_it(tmp_path):
    lm = tiny_lm(kv_cache="int8")
    path = s3d_jax.storage.native.save(tmp_path / "model", lm.config, lm.params)
    assert s3d_jax.load(path).config.kv_cache is None
    assert s3d_jax.load(path, kv_cache="int8").config == lm.config
    fields = json.loads((path / "config.json").read_text())["model"]
    assert ModelConfig.from_dict(fields) == lm.config.replace(kv_cache=None)
    with pytest.raises(ConfigError, match=r"unknown fields \['kv_cache'\]"):
        ModelConfig.from_dict(fields | {"kv_cache": "int8"})
