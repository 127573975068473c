"""HF -> native -> HF: every number arrives, and nothing unknown is accepted."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import convert
from convert import parity, target
from convert.__main__ import main
from convert.families import family_of
from convert.sources import base
from convert.sources.hf_folder import open_weights
from convert.sources.open import open_origin
from convert.sources.safetensors import SafetensorsSource
from convert.to_hf import parse_size
from s3d_jax.errors import CheckpointError, ConfigError, ConversionError
from s3d_jax.nn import transformer as model
from s3d_jax.storage import native as checkpoint
from s3d_jax.storage.trees import flatten
from tests.conftest import need
from tests.convert.hf_folder import FIELDS, random_tensors, write_folder
from tests.tiny import tiny_config, tiny_params

QUIET = dict(parity=False, progress=False)


def convert_folder(folder, out, **options) -> dict[str, np.ndarray]:
    convert.convert(folder, out, **QUIET, **options)
    return {k: np.asarray(v) for k, v in flatten(checkpoint.load(out).params).items()}


def failing(folder, tmp_path, error=ConversionError, **options) -> str:
    """Returns the message of a conversion that must fail and leave nothing behind."""
    with pytest.raises(error) as caught:
        convert.convert(folder, tmp_path / "out", **QUIET, **options)
    assert not list(tmp_path.glob("out*"))
    return str(caught.value)


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_every_number_arrives(tmp_path, shards):
    tensors = random_tensors()
    arrays = convert_folder(write_folder(tmp_path / "hf", tensors, shards=shards), tmp_path / "out")
    t = {name.removeprefix("model."): x for name, x in tensors.items()}
    used = {"embed/embedding": t["embed_tokens.weight"], "lm_head/weight": t["lm_head.weight"]}
    used["final_norm/scale"] = t["norm.weight"]
    for i in range(3):
        hf = {n.removeprefix(f"layers.{i}."): x for n, x in t.items()}
        stacks = {
            "attention/qkv/weight": [f"self_attn.{x}_proj.weight" for x in "qkv"],
            "attention/out/weight": ["self_attn.o_proj.weight"],
            "mlp/gate_up/weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            "mlp/down/weight": ["mlp.down_proj.weight"],
            "attention_norm/scale": ["input_layernorm.weight"],
            "mlp_norm/scale": ["post_attention_layernorm.weight"],
        }
        for path, names in stacks.items():
            used[f"layers_{i}/{path}"] = np.concatenate([hf[name] for name in names])
    assert arrays.keys() == used.keys()
    for path, expected in used.items():
        np.testing.assert_array_equal(arrays[path], expected, err_msg=path)


def test_biases_and_tied_embeddings(tmp_path):
    fields = FIELDS | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    tensors = random_tensors(fields)
    arrays = convert_folder(write_folder(tmp_path / "hf", tensors, fields), tmp_path / "out")
    assert "lm_head/weight" not in arrays
    names = [f"model.layers.1.self_attn.{x}_proj.bias" for x in "qkv"]
    expected = np.concatenate([tensors[name] for name in names])
    np.testing.assert_array_equal(arrays["layers_1/attention/qkv/bias"], expected)
    expected = tensors["model.layers.2.mlp.down_proj.bias"]
    np.testing.assert_array_equal(arrays["layers_2/mlp/down/bias"], expected)


@pytest.mark.parametrize(
    "stored, dtype",
    [
        (ml_dtypes.bfloat16, None),
        (ml_dtypes.bfloat16, "float32"),
        (ml_dtypes.bfloat16, "bfloat16"),
        (ml_dtypes.bfloat16, "float16"),
        (np.float32, "bfloat16"),
        (np.float16, None),
    ],
)
def test_dtype(tmp_path, stored, dtype):
    tensors = random_tensors(dtype=stored)
    folder = write_folder(tmp_path / "hf", tensors, shards=2)
    arrays = convert_folder(folder, tmp_path / "out", dtype=dtype)
    assert {x.dtype.name for x in arrays.values()} == {dtype or np.dtype(stored).name}
    expected = tensors["model.embed_tokens.weight"].astype(arrays["embed/embedding"].dtype)
    np.testing.assert_array_equal(arrays["embed/embedding"], expected)


@pytest.mark.parametrize("named, expected", [("bfloat16", "bfloat16"), (None, "float32")])
def test_mixed_dtypes_go_to_the_one_that_the_config_names(tmp_path, named, expected):
    tensors = random_tensors(dtype=ml_dtypes.bfloat16)
    norm = "model.norm.weight"
    tensors[norm] = tensors[norm].astype(np.float32)
    fields = FIELDS | ({"torch_dtype": named} if named else {})
    arrays = convert_folder(write_folder(tmp_path / "hf", tensors, fields), tmp_path / "out")
    assert {x.dtype.name for x in arrays.values()} == {expected}


def test_all_faults_are_in_one_message(tmp_path):
    tensors = random_tensors()
    missing = "model.layers.1.mlp.up_proj.weight"
    del tensors[missing]
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((40, 24), np.float32)
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(10, np.float32)
    tensors["model.layers.2.mlp.down_proj.weight"] = np.zeros((40, 24), np.float32)
    tensors["model.norm.weight"] = np.zeros(24, np.int64)
    message = failing(write_folder(tmp_path / "hf", tensors), tmp_path)
    lines = [line.strip() for line in message.splitlines()[1:]]
    assert sorted(lines) == [
        "model.layers.0.self_attn.q_norm.weight: unknown",
        f"{missing}: missing",
        "model.layers.2.mlp.down_proj.weight: shape [40, 24], the config asks for [24, 40]",
        "model.layers.3.mlp.up_proj.weight: unknown",
        "model.norm.weight: stored as I64, and supported are float32, bfloat16, float16",
    ]


def test_contradictions_of_shards_are_in_the_same_message(tmp_path):
    tensors = random_tensors()
    folder = write_folder(tmp_path / "hf", tensors, shards=2)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    first = {name: load_file(folder / names[0])[name] for name in list(tensors)[::2]}
    twice, lost, unnamed = list(tensors)[1], list(tensors)[2], list(tensors)[4]
    first[twice] = tensors[twice]
    first["model.layers.0.self_attn.q_norm.weight"] = np.zeros(10, np.float32)
    del first[lost], first[unnamed]
    save_file(first, folder / names[0])
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][unnamed]
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = names[1]
    index["weight_map"]["model.rotary_emb.inv_freq"] = names[1]  # useless, so not missed
    path.write_text(json.dumps(index))
    message = failing(folder, tmp_path)
    assert sorted(line.strip() for line in message.splitlines()[1:]) == sorted(
        [
            f"{twice}: in more than one file: {names[0]}, {names[1]}",
            f"{lost}: missing, and the index says that it is in {names[0]}",
            f"{unnamed}: missing",
            "model.layers.9.mlp.up_proj.weight: missing, and the index says that it is in "
            + names[1],
            "model.layers.0.self_attn.q_norm.weight: unknown",
        ]
    )


def test_lists_of_tensors_are_not_cut(tmp_path):
    tensors = random_tensors()
    tensors |= {f"model.layers.{i}.mlp.x.weight": np.zeros(1, np.float32) for i in range(100)}
    assert failing(write_folder(tmp_path / "hf", tensors), tmp_path).count(": unknown") == 100


def test_a_tied_head_is_compared_in_pieces(tmp_path, monkeypatch):
    head, embeddings = "lm_head.weight", "model.embed_tokens.weight"
    values = np.random.default_rng(0).normal(size=(37, 24)).astype(np.float32)
    monkeypatch.setattr(base, "CHUNK", 5 * 24 + 3)
    sizes = []
    read = SafetensorsSource.read

    def recorded(self, name, out, *rows):
        sizes.append(out.size)
        read(self, name, out, *rows)

    monkeypatch.setattr(SafetensorsSource, "read", recorded)
    for changed in (None, 0, 20, 36):
        other = values.copy()
        if changed is not None:
            other[changed, 3] += 1
        save_file({embeddings: values, head: other}, tmp_path / "model.safetensors")
        source = open_weights(tmp_path)
        assert target._equal(source, head, embeddings) == (changed is None)
    assert max(sizes) == 5 * 24


def test_harmless_extras_are_let_through(tmp_path):
    fields = FIELDS | {"tie_word_embeddings": True}
    tensors = random_tensors(fields)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(5, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    arrays = convert_folder(write_folder(tmp_path / "hf", tensors, fields), tmp_path / "out")
    assert "lm_head/weight" not in arrays
    tensors["lm_head.weight"][-1, -1] += 1e-3
    message = failing(write_folder(tmp_path / "hf2", tensors, fields), tmp_path / "2")
    assert "differs from the embeddings, and tie_word_embeddings is true" in message


# --- config.json ----------------------------------------------------------------------------------


def test_a_field_that_the_user_passes_is_recorded_and_printed(tmp_path, capsys):
    fields = FIELDS | {"colour": "red", "_commit_hash": "0123"}
    folder, out = write_folder(tmp_path / "hf", random_tensors(), fields), tmp_path / "native"
    assert "colour = 'red'" in failing(folder, tmp_path, ConfigError)
    arguments = [str(folder), "--ignore-field", "colour"]
    assert main([*arguments, str(out), "--no-parity"]) == 0
    assert "not understood, and passed: colour of config.json\n" in capsys.readouterr().out
    source = checkpoint.read_header(out).source
    assert source["ignored_fields"] == ["colour"] and source["config"] == fields
    assert main([*arguments, str(tmp_path / "dry"), "--dry-run"]) == 0
    assert "pass       colour of config.json" in capsys.readouterr().out
    assert main(["inspect", *arguments]) == 0
    convert.export(out, tmp_path / "back", progress=False)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["colour"] == "red"
    report = convert.convert(folder, tmp_path / "again", ignore_fields=["colour"], **QUIET)
    assert report.ignored_fields == ("colour",)
    message = failing(out, tmp_path, dtype="bfloat16", ignore_fields="colour")
    assert "--ignore-field is for the config.json of a HF model" in message


@pytest.mark.parametrize(
    "change, message",
    [
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"clip_qkv": 8, "logit_scale": 2}, "clip_qkv = 8, logit_scale = 2"),
        ({"rope_interleaved": True}, "rope_interleaved is true"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "rope type 'ntk' is unknown"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "beta"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number"),
        ({"rope_scaling": [2]}, "rope_scaling must be an object"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta is given"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"hidden_size": -24}, "hidden_size must be an integer"),
        ({"hidden_size": "24"}, "hidden_size must be an integer"),
        ({"hidden_size": 24.0}, "hidden_size must be an integer"),
        ({"vocab_size": 10**20}, "vocab_size must be an integer"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be an integer"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": True}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 7}, "even"),
        ({"head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 5}, "no multiple"),
        ({"eos_token_id": [2, 37]}, "eos_token_id 37 is no token of the vocabulary"),
        ({"model_type": None}, "no model_type"),
        ({"model_type": "mamba"}, "'mamba' is not supported; supported are: gemma, gemma2"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassification'"),
    ],
)
def test_settings_that_are_wrong_or_unknown(tmp_path, change, message):
    folder = write_folder(tmp_path / "hf")
    (folder / "config.json").write_text(json.dumps(FIELDS | change))
    assert message in failing(folder, tmp_path, ConfigError)


def test_full_dumps_of_a_config_are_read():
    """Old checkpoints name every switch of HF's; switches that are off change nothing."""
    off = {"is_decoder": False, "add_cross_attention": False, "pruned_heads": {}}
    family = family_of(FIELDS)
    assert family.config(FIELDS | off) == family.config(FIELDS)
    with pytest.raises(ConfigError, match="is_decoder = True"):
        family.config(FIELDS | {"is_decoder": True})


# --- what comes along -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config_eos, generation, expected",
    [
        (2, None, (2,)),
        ([2, 5], None, (2, 5)),
        (2, {"eos_token_id": [3, 4]}, (3, 4)),
        (2, {"temperature": 0.6}, (2,)),
        (2, {"temperature": 0.6, "use_cache": True, "output_attentions": False}, (2,)),
        (None, None, ()),
    ],
)
def test_end_of_text(tmp_path, config_eos, generation, expected):
    folder = write_folder(tmp_path / "hf", fields=FIELDS | {"eos_token_id": config_eos})
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    convert.convert(folder, tmp_path / "out", **QUIET)
    header = checkpoint.read_header(tmp_path / "out")
    assert header.eos_token_ids == expected
    assert header.generation_config_ignored == {
        k: v for k, v in (generation or {}).items() if k == "temperature"
    }


def test_tokenizer(tmp_path, data_dir):
    source = data_dir / "checkpoints" / "stories260k"
    own = write_folder(tmp_path / "own")
    shutil.copy(source / "tokenizer.json", own)
    convert.convert(own, tmp_path / "a", **QUIET)
    convert.convert(write_folder(tmp_path / "bare"), tmp_path / "b", tokenizer=source, **QUIET)
    for name in "ab":
        assert checkpoint.read_header(tmp_path / name).has_tokenizer
        copied = (tmp_path / name / "tokenizer.json").read_bytes()
        assert copied == (source / "tokenizer.json").read_bytes()
    assert "no tokenizer files" in failing(own, tmp_path, tokenizer=tmp_path)


def test_sources_that_are_none(tmp_path):
    native = tmp_path / "native"
    convert.convert(write_folder(tmp_path / "hf"), native, **QUIET)
    assert "is a native checkpoint already" in failing(native, tmp_path)
    assert "there is no such folder" in failing(tmp_path / "nowhere", tmp_path)
    file = tmp_path / "hf" / "model.safetensors"
    assert "give the HF folder it lies in" in failing(file, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no config.json: is it a HF checkpoint?" in failing(tmp_path / "empty", tmp_path)
    (tmp_path / "hf" / "config.json").write_text("{")
    assert "config.json is not valid JSON" in failing(tmp_path / "hf", tmp_path)
    assert "dtype must be one of" in failing(native, tmp_path, ConfigError, dtype="int8")


def test_an_existing_folder_is_kept_unless_told_otherwise(tmp_path):
    folder, out = write_folder(tmp_path / "hf"), tmp_path / "out"
    convert.convert(folder, out, **QUIET)
    before = (out / "weights.json").read_bytes()
    with pytest.raises(CheckpointError, match="--overwrite"):
        convert.convert(folder, out, dtype="bfloat16", **QUIET)
    assert (out / "weights.json").read_bytes() == before
    convert.convert(folder, out, dtype="bfloat16", overwrite=True, **QUIET)
    assert checkpoint.read_header(out).config.dtype == "bfloat16"
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize("out", ["hf", "."])
def test_the_source_is_never_written_to(tmp_path, out):
    folder = write_folder(tmp_path / "hf")
    files = sorted(p.name for p in folder.iterdir())
    with pytest.raises(CheckpointError, match="what is being read"):
        convert.convert(folder, tmp_path / out, overwrite=True, **QUIET)
    assert sorted(p.name for p in folder.iterdir()) == files
    convert.convert(folder, folder / "native", **QUIET)  # next to the files it does no harm
    checkpoint.load(folder / "native")
    convert.convert(folder, tmp_path / "native", **QUIET)
    with pytest.raises(CheckpointError, match="what is being read"):
        convert.export(tmp_path / "native", tmp_path / "native", overwrite=True, progress=False)
    checkpoint.load(tmp_path / "native")


def test_what_is_read_is_never_replaced_wherever_it_lies(tmp_path, data_dir):
    """The source may be one file of a folder, or links to files in another one."""
    folder = write_folder(tmp_path / "hf")
    shutil.copy(data_dir / "llama2c" / "stories260K.bin", folder)
    links = tmp_path / "links"
    links.mkdir()
    shutil.copy(folder / "config.json", links)
    (links / "model.safetensors").symlink_to(folder / "model.safetensors")
    files = sorted(p.name for p in folder.iterdir())
    for source in (folder / "stories260K.bin", links):
        with pytest.raises(CheckpointError, match="what is being read"):
            convert.convert(source, folder, overwrite=True, **QUIET)
        assert sorted(p.name for p in folder.iterdir()) == files
    convert.convert(folder / "stories260K.bin", tmp_path / "out", **QUIET)
    checkpoint.load(tmp_path / "out")


# --- back to HF -----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size, files", [("5GB", 1), ("12KB", 4), (1000, 30)])
def test_round_trip_is_bit_identical(tmp_path, data_dir, max_shard_size, files):
    fields = FIELDS | {"torch_dtype": "bfloat16", "initializer_range": 0.03}
    tensors = random_tensors(fields, ml_dtypes.bfloat16)
    folder = write_folder(tmp_path / "hf", tensors, fields)
    shutil.copy(data_dir / "checkpoints" / "stories260k" / "tokenizer.json", folder)
    convert.convert(folder, tmp_path / "native", **QUIET)
    convert.export(tmp_path / "native", tmp_path / "back", max_shard_size=max_shard_size)
    written = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(written) == files
    loaded = {name: x for file in written for name, x in load_file(file).items()}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert loaded[name].tobytes() == tensor.tobytes(), name
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == fields
    tokenizer = [(p / "tokenizer.json").read_bytes() for p in (folder, tmp_path / "back")]
    assert tokenizer[0] == tokenizer[1]
    if files > 1:
        index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
        for name, file in index["weight_map"].items():
            assert name in load_file(tmp_path / "back" / file)
        for file in written:
            arrays = load_file(file).values()
            assert len(arrays) == 1 or sum(x.nbytes for x in arrays) <= parse_size(max_shard_size)


def test_a_model_of_our_own_can_be_exported(tmp_path):
    """It has no source to remember, and its groups are in another order than a converter's."""
    torch = need("torch")
    config = tiny_config(num_layers=11)
    params = tiny_params(config, scale=6.0)
    params = {name: params[name] for name in sorted(params)}  # layers_10 before layers_2
    generation = {"eos_token_id": 7}
    checkpoint.save(tmp_path / "native", config, params, generation_config=generation)
    convert.export(tmp_path / "native", tmp_path / "hf", max_shard_size="30KB", progress=False)
    tokens = np.random.default_rng(0).integers(0, 31, (1, 50))
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert hf.config.eos_token_id == 7
    with torch.inference_mode():
        theirs = hf.eval()(torch.tensor(tokens)).logits.numpy()
    ours = np.asarray(model.forward_logits(config, params, tokens))
    assert np.abs(theirs).max() > 1
    assert np.abs(ours - theirs).max() <= 2e-4


def test_what_no_family_can_express_is_refused(tmp_path):
    config = tiny_config(qk_norm=True, logit_softcap=3.0)
    checkpoint.save(tmp_path / "native", config, tiny_params(config))
    with pytest.raises(ConfigError, match="qwen3 cannot express logit_softcap"):
        convert.export(tmp_path / "native", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_sizes():
    sizes = {"5GB": 5 * 10**9, "2GiB": 2**31, "1.5 mb": 1_500_000, "123": 123, 7: 7}
    assert {size: parse_size(size) for size in sizes} == sizes
    for size in ("0", "-1GB", "GB", "5XB", "", "nan"):
        with pytest.raises(ConfigError, match="is no size"):
            parse_size(size)


# --- parity ---------------------------------------------------------------------------------------


def raising(error):
    def function(*arguments):
        raise error

    return function


def test_parity_report(tmp_path, data_dir, monkeypatch):
    need("torch")
    source = data_dir / "checkpoints" / "babyllama-1m"
    report = convert.convert(source, tmp_path / "good", progress=False)
    assert report.num_params == 936_448 and report.num_bytes == 4 * 936_448 and report.tokenizer
    assert report.parity.num_tokens >= 600 and report.parity.is_text
    assert report.parity.max_difference <= 1e-4 and report.parity.greedy_agreement == 1.0
    # It must detect what a short prompt does not: a wrong base of the rotation.
    fields = json.loads((tmp_path / "good" / "config.json").read_text())
    fields["model"]["rope"]["theta"] = 11_000.0
    (tmp_path / "good" / "config.json").write_text(json.dumps(fields))
    origin = open_origin(source)
    wrong, _ = parity.measure_parity(origin, tmp_path / "good", report.num_params)
    assert wrong.max_difference > 0.1 and wrong.greedy_agreement < 0.99

    with monkeypatch.context() as patch:  # the conversion is done, whatever fails in the comparison
        for error, reason in ((RuntimeError("out of luck"), "luck"), (KeyboardInterrupt, "inter")):
            patch.setattr(parity, "_hf_logits", raising(error))
            report = convert.convert(source, tmp_path / "good", overwrite=True, progress=False)
            assert report.parity is None and reason in report.parity_skipped
            checkpoint.load(tmp_path / "good")

    found = open_origin(tmp_path / "good")
    assert "native checkpoint" in parity.measure_parity(found, tmp_path / "good", 1)[1]
    monkeypatch.setattr(parity, "_available_memory", lambda: 10**8)
    assert "0.1 GB are free" in parity.measure_parity(origin, tmp_path / "good", 1)[1]
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: None)
    assert "torch is not installed" in parity.measure_parity(origin, tmp_path / "good", 1)[1]
