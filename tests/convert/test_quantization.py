"""Conversion to int8: what is written, what it costs, and what is refused."""

import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

import convert
import s3d_jax
from convert.__main__ import main
from convert.options import ConversionOptions
from convert.plan import dry_run
from convert.quantization import _loss, _tokens, read_calibration_text
from convert.sources.native import NativeSource
from s3d_jax.drafters.stored import read_draft, save_draft
from s3d_jax.errors import CheckpointError, ConfigError, ConversionError, InputError
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.storage import native as checkpoint
from s3d_jax.storage.tokenizer import read_tokenizer
from s3d_jax.storage.trees import flatten
from s3d_jax.texts.suites import HELD_OUT
from s3d_jax.weights.trees import store_tree, widen_tree
from tests.conftest import need
from tests.convert.hf_folder import FIELDS, random_tensors, write_folder
from tests.tiny import tiny_config, tiny_params
from tests.train.test_objective import noisy_draft


@pytest.fixture(scope="module")
def stories(data_dir, tmp_path_factory):
    """A real model in float32, and the report of its conversion to int8."""
    source = data_dir / "checkpoints" / "babyllama-1m"
    folder = tmp_path_factory.mktemp("stories")
    convert.convert(source, folder / "float", parity=False, progress=False)
    report = convert.convert(source, folder / "int8", quantization="int8", progress=False)
    return folder, report


def with_outliers(folder):
    """A Llama with an activation a hundred times as large as the others, and weights for it."""
    fields = FIELDS | dict(hidden_size=512)
    tensors = random_tensors(fields)
    for name, x in tensors.items():
        if name.endswith("layernorm.weight"):
            x[3] *= 100
        elif name.endswith(tuple(f"{part}_proj.weight" for part in ("q", "k", "v", "gate", "up"))):
            x[:, 3] /= 100
    return write_folder(folder, tensors, fields)


def test_rotation_saves_a_model_with_outliers_and_plain_int8_warns(tmp_path, capsys):
    source = with_outliers(tmp_path / "hf")
    lost = {}
    for name in ("int8", "int8-plain"):
        out = tmp_path / name
        assert main([str(source), str(out), "--quantize", name]) == 0
        warning = "warning: the KL divergence from the float weights is"
        found = capsys.readouterr()
        lost[name] = float(re.search(r"KL divergence (\S+) nats", found.out)[1])
        assert (warning in found.err) == (lost[name] > 0.02)
    assert lost["int8"] < lost["int8-plain"] / 4 and lost["int8-plain"] > 0.02
    assert "convert with --quantize int8 or --dtype bfloat16" in found.err


def test_every_matrix_is_quantised_and_nothing_else(tmp_path):
    source = write_folder(tmp_path / "hf", random_tensors(dtype=ml_dtypes.bfloat16))
    for dtype in ("bfloat16", "float32"):
        options = dict(dtype=dtype, parity=False, progress=False, overwrite=True)
        convert.convert(source, tmp_path / "float", **options)
        report = convert.convert(source, tmp_path / "int8", quantization="int8", **options)
        ours = checkpoint.load(tmp_path / "int8")
        plain = jax.device_get(checkpoint.load(tmp_path / "float").params)
        expected = store_tree(ours.config, plain)
        assert (ours.config.quantization, ours.config.dtype) == ("int8", dtype)
        ours, expected = flatten(ours.params), flatten(expected)
        assert ours.keys() == expected.keys()
        for path, x in ours.items():
            np.testing.assert_array_equal(x, np.asarray(expected[path]))
        assert report.num_bytes == sum(x.nbytes for x in ours.values())
        assert report.loss is None and report.loss_skipped == "not asked for"


def test_what_it_costs_on_a_real_model(stories):
    """Perplexity must stay within one percent."""
    _, report = stories
    before, after = report.loss.perplexity
    assert 1.5 < before < 60 and abs(after / before - 1) <= 0.01
    assert 1e-6 < report.loss.kl <= 0.02 and report.loss.greedy_agreement >= 0.95
    assert report.loss.num_tokens >= 1000
    if report.parity is not None:  # against HF's float32
        assert report.parity.kl > 1e-6 and report.is_rounded


def test_the_loss_matches_its_definition():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 7, (2, 5))
    p, q = ([np.log(rng.dirichlet(np.ones(7), 5)) for _ in range(2)] for _ in range(2))
    loss = _loss(p, q, ids, True)
    kl, log_p = 0.0, 0.0
    for r in range(2):
        for t in range(5):
            kl += sum(np.exp(p[r][t, i]) * (p[r][t, i] - q[r][t, i]) for i in range(7)) / 10
            log_p += p[r][t, ids[r, t + 1]] / 8 if t < 4 else 0
    assert loss.kl == pytest.approx(kl) and loss.perplexity[0] == pytest.approx(np.exp(-log_p))
    assert _loss(p, p, ids, False).kl == 0 and _loss(p, p, ids, False).perplexity is None


def test_a_native_checkpoint_is_recast_with_its_drafts(tmp_path, stories):
    folder, report = stories
    again = convert.convert(folder / "float", tmp_path / "int8", quantization="int8")
    arrays = [checkpoint.read_header(f / "int8").arrays for f in (folder, tmp_path)]
    assert arrays[0] == arrays[1] and again.loss == report.loss
    assert checkpoint.read_header(tmp_path / "int8").source == (
        checkpoint.read_header(folder / "int8").source
    )
    shutil.copytree(folder / "float", tmp_path / "trained")
    loaded = checkpoint.load(tmp_path / "trained")
    draft = DraftConfig((False, True, True, False, False), 3)
    arrays = noisy_draft(loaded.config, loaded.params, draft)
    save_draft(tmp_path / "trained", "mine", draft, arrays, {"steps": 7})
    options = dict(dtype="float16", quantization="int8", parity=False)
    half = convert.convert(tmp_path / "trained", tmp_path / "half", **options)
    assert half.drafts == ("mine",)
    assert (half.config.dtype, half.config.precision) == ("float16", "int8")
    ours = read_draft(tmp_path / "half", "mine", half.config)
    assert (ours.config, ours.training) == (draft, {"steps": 7})
    for x, y in zip(jax.tree.leaves(ours.params), jax.tree.leaves(arrays), strict=True):
        np.testing.assert_array_equal(x, y.astype("float16"))


def test_exports_hold_float_weights(tmp_path, stories):
    folder, _ = stories
    convert.export(folder / "int8", tmp_path / "hf", progress=False)
    convert.convert(tmp_path / "hf", tmp_path / "back", parity=False, progress=False)
    back = checkpoint.load(tmp_path / "back")
    whole = checkpoint.load(folder / "int8")
    assert back.config == whole.config.replace(quantization=None)
    expected = flatten(widen_tree(whole.config, whole.params, "float32"))
    for path, x in flatten(back.params).items():
        np.testing.assert_array_equal(x, expected[path])


def test_what_is_refused(tmp_path, stories):
    folder, _ = stories
    revision = dict(quantization="int8", revision="main")
    lost_text = dict(quantization="int8", text=tmp_path / "none.txt")
    refused = [
        (folder / "int8", dict(dtype="float32"), ConversionError, "is in int8, which is no float"),
        (folder / "int8", dict(quantization="int8"), ConversionError, "s3d-convert export"),
        (folder / "float", revision, ConversionError, "no revision 'main'"),
        (folder / "float", {}, ConversionError, "native checkpoint already"),
        (folder / "float", dict(quantization="int3"), ConfigError, "--quantize. must be one of"),
        (folder / "float", dict(dtype="int8"), ConfigError, "dtype must be one of"),
        (folder / "float", dict(dtype="float16", text="a.txt"), ConfigError, "none is asked for"),
        (folder / "float", lost_text, InputError, "cannot read"),
    ]
    for source, options, kind, message in refused:
        with pytest.raises(kind, match=message):
            convert.convert(source, tmp_path / "out", **options)
        if kind is ConversionError:
            with pytest.raises(kind, match=message):
                dry_run(source, tmp_path / "out", ConversionOptions(**options))
        assert not (tmp_path / "out").exists()
    with pytest.raises((CheckpointError, ConversionError), match="float"):
        convert.convert(folder / "float", folder / "float", dtype="float16", overwrite=True)
    assert checkpoint.load(folder / "float").config.dtype == "float32"


@pytest.mark.parametrize("options", [dict(quantization="int8"), dict(dtype="bfloat16")])
def test_weights_that_are_not_finite_are_named(tmp_path, options):
    config = tiny_config()
    params = jax.device_get(tiny_params(config))
    params["layers_1"]["mlp"]["down"]["weight"] = np.full_like(
        params["layers_1"]["mlp"]["down"]["weight"], np.nan
    )
    source = checkpoint.save(tmp_path / "float", config, params)
    with pytest.raises(ConversionError, match=r"layers_1/mlp/down/weight in .* infinities or NaN"):
        convert.convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_plans_a_native_checkpoint_from_its_header(tmp_path, monkeypatch, capsys):
    config = tiny_config()
    params = tiny_params(config)
    source = checkpoint.save(tmp_path / "float", config, params)
    draft = DraftConfig((False, True, True, False), 3)
    save_draft(source, "mine", draft, noisy_draft(config, params, draft), {})
    words = [str(source), str(tmp_path / "out"), "--quantize", "int8", "--dtype", "bfloat16"]
    with monkeypatch.context() as patch:
        patch.setattr(NativeSource, "read", None)  # no weights are read
        assert main(["--dry-run", *words]) == 0
        planned = dry_run(
            source, tmp_path / "out", ConversionOptions(dtype="bfloat16", quantization="int8")
        )
    out = capsys.readouterr().out
    assert "float: native checkpoint, " in out and "to be written in int8" in out
    assert "drafts     mine" in out and not (tmp_path / "out").exists()
    report = convert.convert(
        source, tmp_path / "out", dtype="bfloat16", quantization="int8", progress=False
    )
    assert (planned.config, planned.num_params) == (report.config, report.num_params)
    assert (planned.num_written, planned.drafts) == (report.num_bytes, report.drafts)
    assert planned.num_read == sum(x.nbytes for x in jax.tree.leaves(params))
    assert sum(planned.files.values()) == sum(
        file.stat().st_size for file in (source / "weights").rglob("*") if file.is_file()
    )
    with pytest.raises(CheckpointError, match="exists"):
        dry_run(source, tmp_path / "out", ConversionOptions(quantization="int8"))


def test_the_text_is_the_users(tmp_path, stories):
    folder, report = stories
    (tmp_path / "mine.txt").write_text("Once upon a time there was a cat. " * 80)
    mine = convert.convert(
        folder / "float", tmp_path / "out", quantization="int8", text=tmp_path / "mine.txt"
    )
    assert mine.loss.perplexity != report.loss.perplexity
    for text, num_tokens in (("a", 3), ("", None)):  # including the token that begins a text
        (tmp_path / "short.txt").write_text(text)
        options = dict(quantization="int8", text=tmp_path / "short.txt", overwrite=True)
        short = convert.convert(folder / "float", tmp_path / "out", **options)
        assert (short.loss and short.loss.num_tokens) == num_tokens
        assert short.loss_skipped == ("" if num_tokens else "the text is too short")


def test_the_text_of_the_package_is_of_both_kinds(stories):
    """Although the stories alone have more tokens than are used."""
    folder, _ = stories
    tokenizer = read_tokenizer(folder / "int8")
    prompts = (HELD_OUT / "stories.jsonl").read_text().splitlines()
    words = "\n".join(json.loads(line)["prompt"] for line in prompts)
    ids = _tokens(folder / "int8", len(tokenizer), read_calibration_text(None))
    assert ids.shape == (8, 256) and len(tokenizer.encode(words)) > ids.size
    text = tokenizer.decode(ids.reshape(-1))
    assert text.count("Once upon") >= 4 and "restaurant" in text and "United Airlines" in text


def test_a_conversion_stands_whatever_ails_the_measurement(tmp_path, stories, monkeypatch):
    folder, _ = stories
    for error, reason in ((RuntimeError("out of luck"), "luck"), (KeyboardInterrupt, "interrupt")):

        def raising(*arguments, error=error):
            raise error

        monkeypatch.setattr("convert.quantization._tokens", raising)
        report = convert.convert(
            folder / "float", tmp_path / "out", quantization="int8", overwrite=True
        )
        assert report.loss is None and reason in report.loss_skipped
        assert checkpoint.load(tmp_path / "out").config.precision == "int8"


def test_the_command(tmp_path, stories, capsys):
    folder, _ = stories
    words = [str(folder / "float"), str(tmp_path / "out"), "--quantize", "int8"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "parameters in int8" in out and "perplexity" in out and "KL divergence" in out
    assert main(["--no-parity", "--overwrite", *words]) == 0
    assert "what int8 costs: not measured, not asked for" in capsys.readouterr().out
    source = write_folder(tmp_path / "hf")
    assert main(["--dry-run", str(source), str(tmp_path / "new"), "--quantize", "int8"]) == 0
    assert "to be written in int8" in capsys.readouterr().out
    planned = dry_run(source, tmp_path / "new", ConversionOptions(quantization="int8"))
    assert planned.num_written < 0.4 * dry_run(source, tmp_path / "new").num_written
    assert s3d_jax.load(tmp_path / "out").config.precision == "int8"


def test_verify_knows_that_int8_rounds(tmp_path, stories, data_dir, capsys):
    need("torch")
    folder, _ = stories
    source = data_dir / "checkpoints" / "babyllama-1m"
    code = main(["verify", str(folder / "int8"), str(source), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["native_dtype"] == "int8" and facts["max_kl"] == 1e-2
    assert code == (0 if facts["agrees"] else 1) and facts["agrees"]
