"""Whatever a process has set of JAX, the outputs are the same."""

import contextlib
import json
import os
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest

import convert
import s3d_jax
from s3d_jax.jax_settings import under_usual_jax_settings, usual_jax_settings
from s3d_jax.lm import LM
from s3d_jax.settings.drafting import DraftConfig, symmetric_skip
from s3d_jax.settings.training import (
    AdapterConfig,
    LoopConfig,
    OptimizerConfig,
    TrainDraftConfig,
    ValidationConfig,
)
from s3d_jax.storage import native as checkpoint
from s3d_jax.texts.suites import Prompt
from s3d_jax.train.folder import read_metrics
from s3d_jax.train.runs import train_draft
from s3d_jax.tune.plan import tune
from tests.convert.hf_folder import write_folder
from tests.sampled import sampled
from tests.tiny import tiny_config, tiny_params

SETTINGS = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_transfer_guard": "disallow",
    "jax_disable_jit": True,
    "jax_default_matmul_precision": "F16_F16_F16",
    "jax_debug_nans": True,
}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7]]
SAMPLING = dict(temperature=[0.8, 0.0], top_k=5, top_p=0.9, repetition_penalty=1.2, seed=[1, 2])


@contextlib.contextmanager
def setting(name, value):
    """The setting in all threads, as an environment variable would make it."""
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    config = tiny_config()
    checkpoint.save(folder / "model", config, tiny_params(config))
    write_folder(folder / "hf")
    lines = [{"prompt_tokens": [i % 31, 2], "tokens": [(i * j) % 31 for j in range(20)]}
             for i in range(20)]  # fmt: skip
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def generated(lm: LM) -> list:
    found = [lm.generate(PROMPTS, method=m, max_new_tokens=8) for m in ("ar", "s3d")]
    found.append(lm.generate(PROMPTS, max_new_tokens=8, logit_bias={3: -1.0}, **SAMPLING))
    streamed = [token for part in lm.stream_tokens(PROMPTS[0], max_new_tokens=8) for token in part]
    return [[result.tokens for result in results] for results in found] + [streamed]


def converted(folder, out) -> list:
    convert.convert(folder / "hf", out, quantization="int8", progress=False)
    convert.export(out, out.with_suffix(".hf"), progress=False)
    lm = s3d_jax.load(out)
    results = [lm.generate([[1, 2, 3]], method=m, max_new_tokens=8)[0] for m in ("ar", "s3d")]
    return [result.tokens for result in results]


def trained(folder, out) -> list:
    config = TrainDraftConfig(
        draft=DraftConfig(symmetric_skip(4, 2), 3),
        adapter=AdapterConfig(2, 2),
        loop=LoopConfig(OptimizerConfig(2), batch_size=4, log_every=1),
        row_length=24,
        validation=ValidationConfig(prompts=2, new_tokens=4),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two steps teach a draft nothing
        train_draft(folder / "model", [folder / "data.jsonl"], out, config, overwrite=True)
    lines = read_metrics(out / "metrics.jsonl")
    return [line["loss"] for line in lines if "loss" in line]


def everything(folder, out) -> dict:
    return {
        "generated": generated(s3d_jax.load(folder / "model", use_draft=False)),
        "converted": converted(folder, out / "int8"),
        "trained": trained(folder, out / "run"),
    }


@pytest.fixture(scope="module")
def usual(folder):
    found = everything(folder, folder / "run")
    assert len(found["trained"]) == 2 and found["generated"][0] == found["generated"][1]
    return found


@pytest.mark.parametrize(
    "name",
    sampled(list(SETTINGS), ["jax_enable_x64"]),
)
def test_outputs_are_the_same(folder, tmp_path, usual, name):
    with setting(name, SETTINGS[name]):
        out = tmp_path / name
        assert everything(folder, out) == usual
        assert getattr(jax.config, name) == SETTINGS[name]  # the caller's are as they were


@pytest.mark.parametrize(
    "name", sampled(["jax_enable_x64", "jax_numpy_rank_promotion"], ["jax_enable_x64"])
)
def test_tuning_works(folder, name):
    prompts = [Prompt("a", np.array(prompt, np.int32)) for prompt in PROMPTS]
    lm = s3d_jax.load(folder / "model", use_draft=False)
    with setting(name, SETTINGS[name]):
        plan = tune(lm, prompts, gammas=(1,), max_new_tokens=4, check=0)
    assert plan.tuning.gamma == 1


def test_the_command_works_under_all_of_them(folder):
    names = [n for n in SETTINGS if n != "jax_debug_nans"]
    values = {name.upper(): str(SETTINGS[name]) for name in names}
    command = [sys.executable, "-m", "s3d_jax", "generate", "1 2 3", "--ids", "--max-new-tokens"]
    done = subprocess.run(
        [*command, "8", "--model", folder / "model"],
        env=os.environ | values,
        capture_output=True,
        text=True,
    )
    lm = s3d_jax.load(folder / "model")
    expected = lm.generate([[1, 2, 3]], max_new_tokens=8)[0].tokens
    assert done.stdout.split() == list(map(str, expected)), done.stderr


def test_a_generator_has_them_only_while_it_runs():
    @under_usual_jax_settings
    def steps():
        yield jax.numpy.arange(2).dtype.name
        yield jax.config.jax_numpy_rank_promotion

    with setting("jax_enable_x64", True), setting("jax_numpy_rank_promotion", "raise"):
        running = steps()
        assert next(running) == "int32"
        assert jax.numpy.arange(2).dtype.name == "int64"
        assert next(running) == "allow"
        assert list(running) == []
        with usual_jax_settings():
            assert jax.config.jax_numpy_rank_promotion == "allow"
        assert jax.config.jax_numpy_rank_promotion == "raise"
