"""What runs on eight devices that XLA makes of a CPU: `test_mesh.py` runs this file.

Not collected by itself, since the number of devices is fixed before jax begins.
"""

import functools
import json
import re

import jax
import numpy as np
import pytest

import s3d_jax
from benchmarks.sharding import collectives
from s3d_jax.commands.main import main
from s3d_jax.drafters import stored
from s3d_jax.drafters.stored import save_draft
from s3d_jax.engine import programs
from s3d_jax.engine.batch import Batch
from s3d_jax.mesh import mesh_of
from s3d_jax.nn.draft import DraftParams, untrained_draft
from s3d_jax.nn.sharding import build_mesh, bytes_here, cache_share, sharding_of, share_bytes
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import ModelConfig, RopeConfig
from s3d_jax.storage import native
from s3d_jax.storage.trees import flatten
from s3d_jax.weights import formats
from s3d_jax.weights.base import num_bytes
from s3d_jax.weights.trees import store_tree
from tests.tiny import tiny_config, tiny_params

MESHES = ("model=2", "data=2,model=2", "model=4", "data=4,model=2")
PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9], [3], [9] * 20]
SAMPLED = dict(temperature=0.9, top_p=0.9, repetition_penalty=1.1, seed=7)
LONGROPE = RopeConfig(
    "longrope",
    short_factors=(1.0, 1.1, 1.3, 1.7),
    long_factors=(1.2, 2.5, 4.0, 9.0),
    original_max_position_embeddings=20,
)
WINDOWS = (8, None)
FAMILIES = {
    "llama": dict(num_kv_heads=2),
    "mistral": dict(sliding_window=(8, 8)),
    "phi3": dict(rope=LONGROPE, num_kv_heads=8),
    "qwen2": dict(qkv_bias=True, tie_embeddings=True, num_kv_heads=1),
    "qwen3": dict(qk_norm=True, num_kv_heads=4),
    "gemma": dict(norm_offset=1.0, embedding_scale=5.0, activation="gelu_tanh", num_kv_heads=1),
    "gemma2": dict(
        post_norms=True, attention_softcap=5.0, logit_softcap=3.0, sliding_window=WINDOWS
    ),
    "gemma3": dict(
        qk_norm=True,
        post_norms=True,
        sliding_window=WINDOWS,
        local_rope=RopeConfig(theta=100.0),
        num_kv_heads=1,
    ),
    "olmo2": dict(qk_norm=True, qk_norm_joint=True, pre_norms=False, post_norms=True),
    "granite": dict(residual_scale=0.3, logit_divisor=2.0, attention_scale=0.2),
    "smollm3": dict(rope_layers=(True, False), mlp_bias=True, attention_out_bias=True),
    "nine heads": dict(num_heads=9, num_kv_heads=3, vocab_size=31),  # as SmolLM2-135M
}


def config_of(family: str, **changes) -> ModelConfig:
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2)
    heads = dict(num_heads=8, num_kv_heads=2, head_dim=8)
    return tiny_config(**(sizes | heads | FAMILIES[family] | changes))


def write(folder, config: ModelConfig, draft: bool = False) -> str:
    """A random model, and a draft of it that has all parts."""
    params = tiny_params(config.unquantized())
    if config.quantization:
        params = store_tree(config, jax.device_get(params))
    native.save(folder / "model", config, params)
    if draft:
        rng = np.random.default_rng(1)

        def low_rank(inputs: int, outputs: int) -> dict[str, np.ndarray]:
            shapes = dict(down=(inputs, 3), up=(3, outputs))
            return {k: rng.normal(0, 0.02, shape).astype(np.float32) for k, shape in shapes.items()}

        d, f = config.hidden_size, config.intermediate_size
        recalled = d + config.num_kv_heads * config.head_dim
        deltas = {
            "attention": {
                "qkv": low_rank(d, config.qkv_features),
                "out": low_rank(config.num_heads * config.head_dim, d),
            },
            "mlp": {"gate_up": low_rank(d, 2 * f), "down": low_rank(f, d)},
        }
        params = DraftParams(
            np.asarray(untrained_draft(config, params).mask_embeddings),
            deltas={"layers_0": deltas},
            bridges={"layers_2": low_rank(recalled, d)},
            chain=low_rank(2 * d, d),
            vocabulary=np.arange(0, config.vocab_size, 2, dtype=np.int32),
        )
        skip = tuple(i == 1 for i in range(config.num_layers))
        save_draft(folder / "model", "default", DraftConfig(skip, 3), params, {})
    return str(folder / "model")


def outputs(lm, **options) -> list[list[int]]:
    return [r.tokens for r in lm.generate(PROMPTS, max_new_tokens=24, **options)]


def check_equal(path: str, meshes, options: dict) -> None:
    """AR and S3D give the tokens of one device."""
    expected = outputs(s3d_jax.load(path), method="ar", **options)
    for mesh in meshes:
        lm = s3d_jax.load(path, mesh=mesh)
        for method in ("ar", "s3d"):
            assert outputs(lm, method=method, **options) == expected, (mesh, method)


QUICK = [
    ("llama", "model=4", None, {}),  # each key head twice
    ("olmo2", "data=2,model=2", None, SAMPLED),
    ("gemma3", "data=4,model=2", None, {}),
    ("nine heads", "model=2", "int8", {}),
]


@pytest.mark.parametrize(("family", "mesh", "quantization", "options"), QUICK)
def test_tokens_are_those_of_one_device(family, mesh, quantization, options, tmp_path):
    config = config_of(family, quantization=quantization)
    check_equal(write(tmp_path, config, draft=quantization is None), [mesh], options)


@pytest.mark.parametrize("quantization", ["int4", "blocks"])
def test_four_bits_as_gpus_hold_them(quantization, tmp_path, monkeypatch):
    """Groups of inputs are divided with the inputs, of fused matrices arranged with the rows."""
    matrices = ("attention/qkv", "attention/out", "mlp/gate_up", "mlp/down")
    kinds = [f"layers_{i}/{m} 4x8:float16+offset" for i in range(2) for m in matrices]
    blocks = (*kinds, "embed 8x16:float32") if quantization == "blocks" else None
    path = write(tmp_path, config_of("llama", quantization=quantization, blocks=blocks))
    gpu = functools.partial(formats.in_memory, backend="gpu")
    monkeypatch.setattr(formats, "in_memory", lambda config, _, mesh=False: gpu(config, mesh=mesh))
    assert s3d_jax.load(path).config.quantization == quantization
    check_equal(path, ["data=2,model=2", "model=4"], {})
    lm = s3d_jax.load(path, mesh="model=2")
    down = lm.params["layers_0"]["mlp"]["down"]
    assert down["weight"].dtype == jax.numpy.int8
    assert down["weight"].addressable_shards[0].data.shape == (32, 24)
    if quantization == "blocks":
        assert "layers_0/mlp/down 8x8:float16+offset" in lm.config.blocks
        assert down["offset"].addressable_shards[0].data.shape == (32, 3)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("family", "options"), [(name, (SAMPLED, {})[i % 2]) for i, name in enumerate(FAMILIES)]
)
def test_all_families_on_all_meshes(family, options, tmp_path):
    """Half of them sampled: what is drawn from the logits does not know the family."""
    check_equal(write(tmp_path, config_of(family)), MESHES, options)


@pytest.mark.exhaustive
@pytest.mark.parametrize("quantization", [None, "int8", "int8-plain"])
@pytest.mark.parametrize("merged", [True, False])
def test_drafts_on_all_meshes(merged, quantization, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "MOST_MERGED", stored.MOST_MERGED if merged else 0)
    path = write(tmp_path, config_of("mistral", quantization=quantization), draft=True)
    check_equal(path, MESHES, {} if merged else SAMPLED)


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", ["model=3", "data=2,model=2"])
def test_the_embedded_model(mesh):
    """Sums of int8 are exact: all tokens are those of one device."""
    one, lm = s3d_jax.load(), s3d_jax.load(mesh=mesh)
    prompt = "Once upon a time"
    for options in ({}, SAMPLED):
        expected = one.generate(prompt, max_new_tokens=40, **options)[0]
        for method in ("s3d", "ar"):
            found = lm.generate(prompt, max_new_tokens=40, method=method, **options)[0]
            assert found.tokens == expected.tokens
    chat, chat_on_mesh = one.conversation(max_new_tokens=16), lm.conversation(max_new_tokens=16)
    for question in ("Book a table for two.", "At seven."):
        assert chat_on_mesh.send(question).tokens == chat.send(question).tokens
    assert chat_on_mesh.send("Thanks!").stats.cached_tokens > 0


def test_many_prompts_in_few_rows(tmp_path):
    """A prompt is prefilled alone and put into a row; at LongRoPE's turn it is prefilled again."""
    path = write(tmp_path, config_of("phi3"))
    one, lm = s3d_jax.load(path), s3d_jax.load(path, mesh="data=2,model=2")
    expected, found = (
        dict(m.generate_many(PROMPTS, rows=2, max_new_tokens=24, method="ar")) for m in (one, lm)
    )
    assert [found[i].tokens for i in found] == [expected[i].tokens for i in found]
    assert len(found) == len(PROMPTS) and len(lm.programs) == len(one.programs)


def test_a_second_model_on_other_devices_is_refused(tmp_path):
    path = write(tmp_path, config_of("llama"))
    one = s3d_jax.load(path)
    with pytest.raises(s3d_jax.ConfigError, match="load both with the same mesh"):
        s3d_jax.load(path, mesh="model=2", draft_model=one)


@pytest.mark.parametrize("method", ["two-model", "prompt-lookup"])
def test_other_methods(method, tmp_path):
    path = write(tmp_path, config_of("qwen3"))
    lm = s3d_jax.load(path, mesh="data=2,model=2", draft_model=path)
    assert outputs(lm, method=method) == outputs(lm, method="ar")


def test_as_many_programs_as_on_one_device(tmp_path):
    """Also where the lengths and limits of the prompts change."""
    path, counts = write(tmp_path, config_of("mistral")), set()
    for mesh in (None, "data=2,model=2"):
        lm = s3d_jax.load(path, mesh=mesh)
        for prompt in ([1] * 20, [2] * 25):
            lm.generate([prompt, prompt], max_new_tokens=20)
        list(lm.stream_tokens([2] * 22, max_new_tokens=17))
        counts.add(len(lm.programs))
    assert len(counts) == 1


# --- where arrays lie, and what is sent -----------------------------------------------------------


@pytest.fixture
def texts(monkeypatch) -> dict[tuple[str, str | None], str]:
    """The compiled programs that a test makes, by function and drafter."""
    found, begin = {}, programs.Program.__init__

    def compile_and_keep(self, function, static, arrays):
        begin(self, function, static, arrays)
        drafter = getattr(static.get("spec"), "drafter", None)
        found[function.__name__, drafter and drafter.name] = self._compiled.as_text()

    monkeypatch.setattr(programs.Program, "__init__", compile_and_keep)
    return found


@pytest.mark.parametrize(("mesh", "rows"), [("model=4", 1), ("data=2,model=2", 2)])
def test_two_all_reduces_per_layer(mesh, rows, texts, tmp_path):
    config = config_of("llama", num_kv_heads=4, vocab_size=256, num_layers=3)
    lm = s3d_jax.load(write(tmp_path, config), mesh=mesh)
    skip = (False, True, False)
    lm.generate(PROMPTS[:rows], max_new_tokens=8, method="ar")
    lm.generate(PROMPTS[:rows], max_new_tokens=8, skip=skip, adaptive=False)

    def layers(count: int) -> list[str]:
        return sorted(
            f"layers_{i}/{m}" for i in range(count) for m in ("attention/out", "mlp/down")
        )

    drafted = [place for place in layers(3) if "layers_1" not in place]
    for drafter, places in ((None, layers(3)), ("s3d", sorted(layers(3) + drafted))):
        found = collectives(texts["decode", drafter])
        passes = 1 if drafter is None else 2
        places_of = [re.search(r"layers_\d+/\w+/\w+|embed", sent.where) for sent in found]
        in_model = [(sent.how, p[0]) for sent, p in zip(found, places_of, strict=True) if p]
        assert sorted(in_model) == sorted(
            [("all-reduce", place) for place in places] + [("all-reduce", "embed")] * passes
        )
        # Elsewhere token ids, and the best of each device's share of the vocabulary: no weights, no
        # keys or values, and no logits.
        for sent, place in zip(found, places_of, strict=True):
            assert place or max(sent.sizes) <= 2 * 64 * rows, sent


def test_each_device_gets_its_share_alone(tmp_path, monkeypatch):
    config = config_of("llama", hidden_size=256, intermediate_size=1024, vocab_size=4096)
    path = write(tmp_path, config)
    whole, put = [], jax.device_put

    def put_and_note(x, *to, **options):
        whole.extend(leaf.nbytes for leaf in jax.tree.leaves(x))
        return put(x, *to, **options)

    monkeypatch.setattr(jax, "device_put", put_and_note)
    loaded = native.load(path, mesh=build_mesh("model=4"))
    assert max(whole, default=0) < 100  # no array goes through one device
    arrays = flatten(loaded.params)
    by_device = dict.fromkeys(jax.devices()[:4], 0)
    for array in arrays.values():
        for share in array.addressable_shards:
            by_device[share.device] += share.data.nbytes
    total = sum(x.nbytes for x in flatten(native.load(path).params).values())
    assert max(by_device.values()) <= 1.05 * total / 4
    assert set(by_device.values()) == {share_bytes(build_mesh("model=4"), loaded.config, arrays)}


def test_the_cache_is_born_in_shares(tmp_path):
    lm = s3d_jax.load(write(tmp_path, config_of("mistral", num_kv_heads=4)), mesh="data=2,model=2")
    before = {id(x) for x in jax.live_arrays()}
    stream = lm.stream_tokens([1, 2, 3], max_new_tokens=4)
    caches = [x for x in jax.live_arrays() if id(x) not in before and x.ndim == 4]
    assert caches and all(x.shape[1] == 4 for x in caches)
    assert all(share.data.shape[1] == 2 for x in caches for share in x.addressable_shards)
    list(stream)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_rounded_cache_is_divided_with_its_scales(quantization, tmp_path):
    path = write(tmp_path, config_of("gemma3", num_kv_heads=4, quantization=quantization))
    expected = outputs(s3d_jax.load(path, kv_cache="int8"), method="ar")
    lm = s3d_jax.load(path, kv_cache="int8", mesh="data=2,model=2")
    batch = Batch(lm.engine, [np.asarray(prompt, np.int32) for prompt in PROMPTS])
    arrays = jax.tree.leaves((batch._state.cache.keys, batch._state.cache.values))
    assert {x.dtype.name for x in arrays} == {"int8", "float32"} and len(arrays) == 8
    assert {share.data.shape[:2] for x in arrays for share in x.addressable_shards} == {(2, 2)}
    assert cache_share(mesh_of(lm.params), lm.config, 4, num_bytes(arrays)) == bytes_here(arrays)
    for method in ("ar", "s3d"):
        assert outputs(lm, method=method) == expected


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_model_is_written_as_from_one_device(quantization, tmp_path):
    path = write(tmp_path, config_of("olmo2", quantization=quantization))
    loaded = native.load(path, mesh=build_mesh("data=2,model=4"))
    native.save(tmp_path / "again", loaded.config, loaded.params)
    for name in ("weights.json", "config.json"):
        again, before = (
            (tmp_path / "again" / name).read_text(),
            (native.Path(path) / name).read_text(),
        )
        assert again == before


@pytest.mark.parametrize(
    ("mesh", "error", "words"),
    [
        ("model=16", s3d_jax.DeviceError, "needs 16 devices, and jax has 8"),
        (
            "model=5",
            s3d_jax.ConfigError,
            "do not divide the model's feed-forward width of 576: model=4 does",
        ),
        ("modle=2", s3d_jax.ConfigError, "'modle' is none"),
        (jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",)), s3d_jax.ConfigError, "axis 'x'"),
    ],
)
def test_a_bad_mesh_is_refused_before_anything_is_loaded(mesh, error, words, monkeypatch):
    monkeypatch.setattr(native, "read_array", None)
    with pytest.raises(error, match=re.escape(words)):
        s3d_jax.load(mesh=mesh)


def test_a_mesh_of_jax():
    """Its axes may be named in any order, one may be missing, and they may be of any type."""
    devices = np.array(jax.devices()[:6])
    mesh = build_mesh(jax.sharding.Mesh(devices.reshape(3, 2), ("model", "data")))
    assert dict(mesh.shape) == {"data": 2, "model": 3}
    assert mesh.devices[1, 2] == devices[5] and mesh.devices[1, 0] == devices[1]
    explicit = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    mesh = build_mesh(explicit)
    assert dict(mesh.shape) == {"data": 1, "model": 2}
    assert sharding_of(mesh, config_of("llama"), "embed/embedding", (4, 4)).spec[0] == "model"


def test_commands(tmp_path, capsys):
    path = write(tmp_path, config_of("llama"))
    said = []
    for more in ([], ["--mesh", "data=2,model=4"]):
        command = ["generate", "1 2 3", "3 4", "--ids", "--model", path, "--max-new-tokens", "8"]
        assert main([*command, *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert main(["info", "--model", path, "--mesh", "data=16,model=4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["mesh"]
    assert facts["replicated"][0].startswith("key heads, 2 times")
    arrays = flatten(native.load(path, mesh=build_mesh("model=4")).params).values()
    there = sum(x.addressable_shards[0].data.nbytes for x in arrays)
    assert facts["weight_bytes_per_device"] == there
    assert main(["info", "--model", path, "--mesh", "data=2,model=5"]) == 2
    assert "do not divide the model's feed-forward width of 48" in capsys.readouterr().err
