"""The other methods: exact for any proposal, and always right where the drafter is the target."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
import s3d_jax
from s3d_jax.commands import main as cli
from s3d_jax.decoding import sizes
from s3d_jax.decoding.sampling import SamplingConfig, batch_sampling
from s3d_jax.decoding.state import DecodeSpec, Inputs
from s3d_jax.decoding.step import decode_jit
from s3d_jax.drafters.base import Drafter
from s3d_jax.drafters.prompt_lookup import PromptLookup
from s3d_jax.drafters.token_by_token import SelfSpeculative
from s3d_jax.drafters.two_model import TwoModel
from s3d_jax.engine.batch import Batch
from s3d_jax.errors import ConfigError
from s3d_jax.settings.drafting import DraftConfig, PromptLookupConfig, TwoModelConfig
from tests.sampled import sampled
from tests.tiny import begin, tiny_config, tiny_lm, tiny_params

PROMPTS = [[3], [5, 9, 2], list(range(1, 18)), [7] * 40]
NEW = 24
WHOLE = [False] * 4
METHODS = ("prompt-lookup", "self-spec", "early-exit", "two-model")


@pytest.fixture(scope="module")
def lm() -> s3d_jax.LM:
    model = tiny_lm()
    model.draft_model = tiny_lm(seed=1, num_layers=2)
    return model


@pytest.fixture(scope="module")
def truth(lm) -> list[list[int]]:
    return [r.tokens for r in lm.generate(PROMPTS, max_new_tokens=NEW, method="ar")]


@pytest.mark.parametrize("method", METHODS)
def test_greedy_rows_are_those_of_plain_decoding(lm, truth, method):
    results = lm.generate(PROMPTS, max_new_tokens=NEW, method=method, gamma=3)
    assert [r.tokens for r in results] == truth
    for stats in (r.stats for r in results):
        assert stats.drafted == 3 * (stats.iterations - stats.plain_iterations)
        assert len(stats.accepted_per_position) == 3
        # One bonus token per iteration, but where the last block was cut.
        assert stats.accepted + stats.iterations - 1 <= NEW <= stats.accepted + stats.iterations
    stops = {truth[0][4], truth[2][7]}
    stopped = lm.generate(
        PROMPTS, max_new_tokens=NEW, method=method, gamma=3, eos_token_ids=sorted(stops)
    )
    for row, expected in zip(stopped, truth, strict=True):
        end = next((i + 1 for i, token in enumerate(expected) if token in stops), NEW)
        assert row.tokens == expected[:end]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.exhaustive
def test_penalised_rows_of_different_length_are_those_of_plain_decoding(lm, method):
    options = dict(max_new_tokens=[9, 24, 1, 17], presence_penalty=[0.0, 2.0, 0.5, 9.0])
    options |= dict(repetition_penalty=1.3)
    expected = [r.tokens for r in lm.generate(PROMPTS, method="ar", **options)]
    assert [r.tokens for r in lm.generate(PROMPTS, method=method, **options)] == expected
    stream = lm.stream_tokens(PROMPTS[1], max_new_tokens=24, method=method, presence_penalty=2.0)
    alone = lm.generate(PROMPTS[1], max_new_tokens=24, method="ar", presence_penalty=2.0)
    assert sum(stream, []) == alone[0].tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", ["self-spec", "two-model"])
@pytest.mark.exhaustive
def test_a_draft_that_is_the_target_is_always_right(method, temperature):
    """Also after blocks that were accepted whole, after which a cache could lack a token.

    Penalties and filters apply to the draft as well, and to its tokens among themselves.
    """
    lm = tiny_lm()
    lm.draft_model = lm
    options = dict(temperature=temperature, presence_penalty=1.0, top_p=0.9, seed=3)
    for gamma in (1, 4):
        new = 5 * (gamma + 1)
        settings = dict(max_new_tokens=new, method=method, gamma=gamma, **options)
        skip = {"skip": WHOLE} if method == "self-spec" else {}
        for row in lm.generate(PROMPTS, **settings, **skip):
            assert row.stats.iterations == 5
            assert row.stats.accepted_per_position == (5,) * gamma


def lookup(tokens: list[int], gamma: int, ngram: int) -> list[int]:
    """Prompt lookup in plain Python: the longest suffix first, its latest occurrence."""
    for n in range(min(ngram, len(tokens) - 1), 0, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                period = len(tokens) - end
                return [tokens[end + i % period] for i in range(gamma)]
    return [tokens[-1]] * gamma


def test_prompt_lookup_against_plain_python():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 4, n).tolist() for n in [1, 2, *rng.integers(1, 40, 60).tolist()]]
    prompts += [[1, 2, 3, 9, 9, 1, 2, 3], [5, 5], [1, 2, 1, 2, 1]]
    sampling, features = batch_sampling(
        [SamplingConfig()] * len(prompts), jax.random.split(jax.random.key(0), len(prompts)), 31
    )
    arrays = [np.asarray(p, np.int32) for p in prompts]
    lengths = np.array([len(p) for p in prompts])
    for ngram in (1, 3):
        spec = DecodeSpec(tiny_config(), PromptLookup(PromptLookupConfig(5, ngram)), features)
        state = begin(spec, arrays, lengths + 9, 64, sampling)
        scratch = rng.integers(0, 4, state.tokens.shape)  # what is after x_n must not count
        tokens = jnp.where(jnp.arange(64) < lengths[:, None], state.tokens, scratch)
        cache = state.cache.replace(length=jnp.asarray(lengths - 1))
        state = state.replace(cache=cache, tokens=tokens)
        proposal = spec.drafter.propose(Inputs(spec, {}, None, state, 50))
        expected = [lookup(p, 5, ngram) for p in prompts]
        assert np.asarray(proposal.tokens).tolist() == expected


def test_prompt_lookup_finds_what_is_repeated():
    """A model that copies makes blocks whole: here one that says the same token for ever."""
    lm = tiny_lm()
    result = lm.generate(
        [1, 2], max_new_tokens=25, method="prompt-lookup", gamma=4, logit_bias={9: 1e9}
    )[0]
    assert result.tokens == [9] * 25
    # x_n is none of them at first: what it proposes is right from the second iteration on.
    assert (result.stats.iterations, result.stats.accepted_per_position) == (6, (5, 5, 5, 5))


@pytest.mark.usefixtures("compiled_here")
@pytest.mark.parametrize("method", sampled(["self-spec", "two-model"], ["two-model"]))
def test_drafting_copies_no_cache(method):
    """Drafting token by token is a loop inside the loop, and still writes in place."""
    config = tiny_config(num_layers=2, head_dim=20)
    params = tiny_params(config)
    rows = [SamplingConfig()] * 3
    sampling, features = batch_sampling(rows, jax.random.split(jax.random.key(0), 3), 31)
    if method == "self-spec":
        drafter: Drafter = SelfSpeculative(DraftConfig((False, True), 4))
    else:
        drafter = TwoModel(TwoModelConfig(config, 4))
    spec = DecodeSpec(config, drafter, features)
    sizes = []
    for slots in (512, 4096):
        prompts = [np.arange(n, dtype=np.int32) for n in (1, 5, 9)]
        state = begin(spec, prompts, [60] * 3, slots, sampling)
        lowered = decode_jit.lower(spec, params, params, state, jnp.int32(5), 64)
        sizes.append(lowered.compile().memory_analysis().temp_size_in_bytes)
        cache = sum(x.nbytes for x in (*state.cache.keys, *state.cache.values))
    assert sizes[1] - sizes[0] < cache / 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="lookahead"), "method must be one of"),
        (dict(method="prompt-lookup", gamma=0), "gamma must be an integer >= 1"),
        (dict(method="two-model", gamma=0), "gamma must be an integer >= 1"),
        (dict(method="prompt-lookup", ngram=0), "ngram must be at least 1 and at most 64, got 0"),
        (dict(method="ar", ngram=0), "ngram must be"),
        (dict(method="self-spec", ngram=2), "'self-spec' has no ngram; it has gamma, skip"),
        (dict(method="prompt-lookup", skip=WHOLE), "has no skip; it has gamma, ngram"),
        (dict(method="two-model", skip=WHOLE), "has no skip; it has gamma"),
        (dict(method="self-spec", skip=[True] * 3), "skip"),
        (dict(method="early-exit", skip=[False, True, False, False]), "the last layers"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(lm, options, message):
    programs = len(lm.programs)
    with pytest.raises(ConfigError, match=message):
        lm.generate([1, 2], **options)
    assert len(lm.programs) == programs


def test_two_models_need_a_second_one_of_the_same_vocabulary(lm):
    with pytest.raises(ConfigError, match=r"load.*draft_model=.*--draft-model DIR"):
        tiny_lm().generate([1, 2], method="two-model")
    with pytest.raises(ConfigError, match="vocabulary of 30 tokens, the model one of 31"):
        lm.draft_model = tiny_lm(vocab_size=30)
    assert lm.draft_model.config.vocab_size == 31


@pytest.fixture(scope="module")
def stories(data_dir, tmp_path_factory) -> dict[str, str]:
    folders = {}
    for name in ("stories260k", "stories280k-draft", "babyllama-1m"):
        folder = tmp_path_factory.mktemp("models") / name
        source = data_dir / "checkpoints" / name
        convert.convert(source, folder, parity=False, progress=False)
        folders[name] = str(folder)
    return folders


def test_one_real_model_drafts_for_another(stories, capsys):
    lm = s3d_jax.load(stories["stories260k"], draft_model=stories["stories280k-draft"])
    prompts = ["Once upon a time", "The", "Lily and Tom went to the park. They saw"]
    expected = lm.generate(prompts, max_new_tokens=100, method="ar")
    results = lm.generate(prompts, max_new_tokens=100, method="two-model", gamma=4)
    assert [r.tokens for r in results] == [r.tokens for r in expected]
    assert min(r.stats.tokens_per_iteration for r in results) > 1.5
    options = ["--model", stories["stories260k"], "--draft-model", stories["stories280k-draft"]]
    command = ["generate", prompts[0], *options, "--max-new-tokens", "100", "--json"]
    assert cli.main([*command, "--method", "two-model", "--gamma", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == expected[0].tokens
    assert cli.main(command) == 2
    assert "--draft-model is for --method two-model" in capsys.readouterr().err


def test_models_of_other_tokenizers_are_refused(stories):
    lm, other = s3d_jax.load(stories["stories260k"]), s3d_jax.load(stories["stories280k-draft"])
    with pytest.raises(ConfigError, match="vocabulary of 105"):
        s3d_jax.load(stories["stories260k"], draft_model=stories["babyllama-1m"])
    other.tokenizer.add_tokens(["<new>"])
    with pytest.raises(ConfigError, match=r"tokenizer is another one.*<new>"):
        lm.draft_model = other


@pytest.mark.parametrize("method", sampled(METHODS, ["self-spec"]))
def test_drafts_and_rings(method, monkeypatch):
    """Layers with a window keep a ring of slots; what drafts write there must do no harm."""
    monkeypatch.setattr(sizes, "PREFILL_BUCKETS", (4, 8))
    windows = dict(sliding_window=(5, None, 5, None))
    lm = tiny_lm(**windows)
    lm.draft_model = tiny_lm(seed=1, **windows)
    prompts = [[1, 2, 3], list(range(20))]
    options = dict(max_new_tokens=[40, 25], frequency_penalty=1.5)
    expected = [r.tokens for r in lm.generate(prompts, method="ar", **options)]
    assert [r.tokens for r in lm.generate(prompts, method=method, gamma=3, **options)] == expected


def test_two_models_take_no_cache_over(lm):
    """What is kept of a turn is the target's cache alone; the draft model's must be whole."""
    options = dict(max_new_tokens=12, frequency_penalty=1.5)
    before = Batch(lm.engine, [np.arange(9, dtype=np.int32)], **options)
    list(before.run())
    prompt = np.asarray([*range(9), *before.tokens[0], 3], np.int32)
    batch = Batch(lm.engine, [prompt], before.kept(), method="two-model", gamma=3, **options)
    list(batch.run())
    (result,) = batch.results()
    (fresh,) = lm.generate([prompt], method="two-model", gamma=3, **options)
    assert result.tokens == fresh.tokens
    assert result.stats.accepted == fresh.stats.accepted
    assert result.stats.cached_tokens == 0
