"""What is computed of a generation's memory is what its arrays and programs take."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import s3d_jax
from s3d_jax.commands.info import _memory_rows
from s3d_jax.commands.main import main
from s3d_jax.drafters.stored import read_draft
from s3d_jax.engine.batch import Batch
from s3d_jax.engine.ledger import CARDS, Ledger, ledger, plan_of, scratch_bytes, what_fits
from s3d_jax.lm import EMBEDDED
from s3d_jax.nn.transformer import weight_bytes
from s3d_jax.storage import native as checkpoint
from s3d_jax.weights.base import num_bytes
from s3d_jax.weights.trees import store_tree
from tests.tiny import tiny_config, tiny_params


def arrays_bytes() -> int:
    return sum(x.nbytes for x in jax.live_arrays())


@pytest.mark.usefixtures("compiled_here")
@pytest.mark.parametrize("method", ["s3d", "ar"])
def test_the_ledger_is_what_a_generation_takes(method):
    drafts = method == "s3d"
    before = arrays_bytes()
    lm = s3d_jax.load(use_draft=drafts)
    context, batch, gamma = 400, 3, 4
    prompts = [np.ones(context // 2, np.int32)] * batch
    options = dict(gamma=gamma, adaptive=False) if drafts else dict(method="ar")
    running = Batch(lm.engine, prompts, max_new_tokens=context // 2, eos_token_ids=(), **options)
    assert list(running.run())
    taken = arrays_bytes() - before
    draft = read_draft(EMBEDDED, "default", lm.config)
    plan = plan_of(context, batch, gamma if drafts else 0, lm.max_length)
    found = ledger(lm.config, plan, (draft.config, draft.params) if drafts else None, 0)
    assert taken == pytest.approx(found.weights + found.draft + found.cache, rel=0.05)
    assert (found.draft > 1.5e6) == drafts


def test_scratch_holds_what_a_pass_computes():
    config = s3d_jax.load().config
    found = {batch: scratch_bytes(config, plan_of(512, batch, 0, 512), None) for batch in (1, 4)}
    # Queries times slots times heads, float32, of a prefill of 256 tokens.
    scores = 4 * config.num_heads * 256 * 256
    for batch, scratch in found.items():
        assert batch * scores <= scratch <= 12 * batch * scores


def test_cards_hold_what_is_below_their_size():
    small, large = (Ledger("int8", n << 30, 1 << 30, 1 << 29, 0) for n in (13, 21))
    assert [card for card in CARDS if small.fits(card)] == ["T4", "L4", "A100"]
    assert [card for card in CARDS if large.fits(card)] == ["A100"]
    assert small.total == (14 << 30) + (1 << 29)


def test_precisions_that_a_model_can_have(tmp_path, capsys):
    """int4 needs even widths; a mesh holds in bytes what a device holds in four bits."""
    for width, names in ((40, ["int8", "int4"]), (41, ["int8"])):
        config = tiny_config(intermediate_size=width)
        checkpoint.save(tmp_path / "model", config, tiny_params(config), overwrite=True)
        command = ["info", "--model", str(tmp_path / "model"), "--context", "64", "--json"]
        assert main(command) == 0
        rows = json.loads(capsys.readouterr().out)["memory"]
        assert [row["precision"] for row in rows] == ["float32", "bfloat16", "float16", *names]
    config = tiny_config(quantization="int4")
    tree = store_tree(config, jax.device_get(tiny_params(config.unquantized())))
    checkpoint.save(tmp_path / "int4", config, tree)
    command = ["info", "--model", str(tmp_path / "int4")]
    assert main(command) == 0
    assert "on CPUs      held as int8, with the same numbers" in capsys.readouterr().out
    in_bytes = weight_bytes(config.replace(quantization="int8"))
    assert main([*command, "--json", "--context", "64"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [row["weights"] for row in facts["memory"]] == [num_bytes(tree), in_bytes]
    assert main([*command, "--json", "--mesh", "model=1"]) == 0
    assert json.loads(capsys.readouterr().out)["mesh"]["weight_bytes_per_device"] == in_bytes
    assert main([*command, "--mesh", "model=1", "--batch", "2"]) == 2
    assert "give them apart" in capsys.readouterr().err


def test_info_prints_it(capsys):
    assert main(["info", "--context", "512", "--batch", "2", "--method", "ar"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("int8-plain"))
    weights, draft, cache, _, total = map(float, line.split()[1:6])
    assert draft == 0 and weights == pytest.approx(4.6, abs=0.1)
    assert cache > 2 * 512 * 2 * 64 * 4 * 10 / 2**20
    assert total > weights + cache and line.endswith("T4, L4, A100")
    assert main(["info", "--gamma", "2", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["memory"]
    assert row["total"] == sum(row[k] for k in ("weights", "draft", "cache", "scratch"))
    assert row["draft"] > 1.5e6 and row["fits"] == list(CARDS)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--context", "513"], "--context must be at most 512"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--draft", "other"], "other"),
        (["--method", "ar", "--gamma", "3"], "--gamma and --draft are of --method s3d"),
    ],
)
def test_wrong_sizes_are_refused(words, message, capsys):
    assert main(["info", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "limit, words",
    [
        (None, "cache 8.00, scratch 0.50"),
        (11, "jax may use 11.00. It has room for 1 row of that length or 4 rows of 1,536 tokens"),
        (9, "jax may use 9.00. It has room for 4 rows of 512 tokens"),
        (8, "no room for caches next to the rest; converted to int8 (s3d-convert --quantize int8), "
         "the weights are 0.00"),
        (99, "some of which others hold, or which is in pieces (start Python again)"),
    ],
)  # fmt: skip
def test_what_fits_is_told(limit, words):
    sizes = dict(weights=7 * 10**9, draft=5 * 10**8, cache=8 * 10**9, scratch=5 * 10**8)
    bytes_ = None if limit is None else limit * 10**9
    text = what_fits(Ledger("float16", **sizes), tiny_config(), 4, 4096, bytes_)
    assert text.startswith("4 rows of 4,096 tokens in float16 need, in GB: weights 7.00, draft 0.5")
    assert text.endswith(words)
    assert "rows" not in what_fits(Ledger("int8", **sizes), tiny_config(), 1, 4096, None)


def test_cards_that_need_more_than_jax_takes_by_default_are_marked():
    whole = Ledger("float16", weights=12 * 2**30, draft=0, cache=0, scratch=0)
    small = dataclasses.replace(whole, precision="int8", weights=6 * 2**30)
    _, _, line, other, note = _memory_rows([whole, small])
    assert line.endswith("  T4*, L4, A100") and other.endswith("  T4, L4, A100")
    assert note.startswith("* with XLA_CLIENT_MEM_FRACTION=0.95")
    assert not list(_memory_rows([small]))[-1].startswith("*")
