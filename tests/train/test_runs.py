"""Training as users do it: distill, train, generate; and a model from scratch."""

import json

import jax
import numpy as np
import pytest

import s3d_jax
from s3d_jax.drafters.stored import read_draft
from s3d_jax.errors import CheckpointError, ConfigError
from s3d_jax.settings.drafting import DraftConfig, parse_skip
from s3d_jax.settings.training import (
    AdapterConfig,
    LoopConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainDraftConfig,
    ValidationConfig,
)
from s3d_jax.storage import native as checkpoint
from s3d_jax.train import runs
from s3d_jax.train.beginning import beginning_of_features
from tests.tiny import tiny_config
from tests.train.command import run, train


def test_training_teaches_the_draft_and_changes_no_output(model, capsys):
    assert train(model, "default") == 0
    printed = capsys.readouterr().out
    assert "tokens per iteration:" in printed and "draft 'default' is in" in printed
    lines = [json.loads(x) for x in (model / "run-default/metrics.jsonl").read_text().splitlines()]
    validations = [line["validation"] for line in lines if "validation" in line]
    taus = [v["tokens_per_iteration"] for v in validations]
    assert len(taus) == 3 and taus[-1] > taus[0] + 0.4
    assert (model / "run-default/curves.png").exists()

    lm, plain = s3d_jax.load(model / "model"), s3d_jax.load(model / "model", use_draft=False)
    assert lm.draft_config.gamma == 3
    prompts = [[3, 1, 4], [15, 9], [26, 5, 3, 5]]
    ours = lm.generate(prompts, max_new_tokens=40, copies=False)
    theirs = plain.generate(prompts, max_new_tokens=40, copies=False)
    reference = plain.generate(prompts, max_new_tokens=40, method="ar")
    assert [r.tokens for r in ours] == [r.tokens for r in reference]
    assert sum(r.stats.iterations for r in ours) < sum(r.stats.iterations for r in theirs)

    assert run("info", "--model", model / "model", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["drafts"]["default"]["gamma"] == 3
    assert facts["drafts"]["default"]["tokens_per_iteration"] == pytest.approx(taus[-1])


@pytest.mark.parametrize("kind, options", [("eagle", ["--fit-rows", "64"]), ("medusa", [])])
def test_drafts_of_other_kinds_are_trained_and_used_like_s3d_s(
    kind, options, model, capsys, monkeypatch
):
    # This model repeats a token, and so does a Medusa without any training.
    monkeypatch.setattr(runs, "warn_if_useless", lambda *arguments: None)
    kinds = ("--kind", kind)
    assert train(model, kind, *kinds, *options, "--draft-vocab", "20") == 0
    printed = capsys.readouterr().out
    assert f"draft '{kind}' is in" in printed and "20 tokens can be drafted" in printed
    stored = read_draft(model / "model", kind, tiny_config())
    assert stored.kind == kind and stored.config.gamma == 3
    reached = stored.training["reached"]["tokens_per_iteration"]
    assert reached > 1.1
    lm = s3d_jax.load(model / "model")
    prompts = [[3, 1, 4], [15, 9], [26, 5, 3, 5]]
    ours = lm.generate(prompts, max_new_tokens=40, method=kind)
    assert [r.tokens for r in ours] == [
        r.tokens for r in lm.generate(prompts, max_new_tokens=40, method="ar")
    ]
    assert sum(r.stats.accepted for r in ours) > 0
    # Another run goes on with its γ and its tokens, and no other kind with it.
    assert train(model, f"{kind}-2", *kinds, "--start", kind) == 0
    again = read_draft(model / "model", f"{kind}-2", tiny_config())
    assert len(again.params.vocabulary) == 20
    config = TrainDraftConfig(kind=kind, start=kind)
    draft, _, start = beginning_of_features(model / "model", tiny_config(), config)
    assert draft.gamma == 3 and start is not None
    capsys.readouterr()
    for wrong, message in (
        (("--start", kind), f"of the kind '{kind}', not 's3d'"),
        ((*kinds, "--rank", "4"), f"--rank: belong to --kind s3d, not {kind}"),
        ((*kinds, "--mode", "mask"), "mode 'mask' belongs to kind 's3d'"),
        ((*kinds, "--remat"), "remat"),
        ((*kinds, "--start", kind, "--draft-vocab", "5"), "drafts 20 tokens, not 5"),
    ):
        assert train(model, "x", *wrong) == 2
        assert message in capsys.readouterr().err
    assert train(model, kind, "--overwrite") == 2
    assert f"the name '{kind}' is for drafts of the kind" in capsys.readouterr().err


def test_a_merged_draft_learns_and_its_mode_is_kept(model, capsys):
    options = ("--draft-mode", "merged", "--rank", "4", "--chain-rank", "8")
    assert train(model, "merged", *options) == 0
    lines = [json.loads(x) for x in (model / "run-merged/metrics.jsonl").read_text().splitlines()]
    taus = [x["validation"]["tokens_per_iteration"] for x in lines if "validation" in x]
    assert taus[-1] > taus[0] + 0.4
    lm = s3d_jax.load(model / "model", draft="merged")
    assert lm.draft_config == DraftConfig((False,) * 4, 3, mode="merged")
    assert lm.draft_params.mask_embeddings.shape[0] == 3 and not lm.draft_params.bridges
    prompts = [[3, 1, 4], [15, 9], [26, 5, 3, 5]]
    ours = lm.generate(prompts, max_new_tokens=40)
    reference = lm.generate(prompts, max_new_tokens=40, method="ar")
    assert [r.tokens for r in ours] == [r.tokens for r in reference]
    assert sum(r.stats.accepted for r in ours) > sum(r.stats.iterations for r in ours) / 3
    capsys.readouterr()
    more = ("--start", "merged", "--draft-mode", "two-pass")
    assert train(model, "x", *more) == 2
    assert "--draft-mode: --start takes what that draft has" in capsys.readouterr().err


def test_a_run_is_continued_and_a_draft_not_replaced_by_accident(model, capsys):
    assert train(model, "again", "--steps", "20") == 0
    assert train(model, "again", "--steps", "20") == 2
    assert "has a draft 'again' already" in capsys.readouterr().err
    assert train(model, "again", "--steps", "20", "--overwrite") == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert train(model, "again", "--steps", "20", "--overwrite", "--resume") == 0


def test_a_fit_is_where_training_begins(model, capsys):
    size = ("--steps", "2", "--recall", "2", "--rank", "4", "--bridge-rank", "40")
    parts = (*size, "--fit-rows", "40")
    assert train(model, "fitted", *parts) == 0
    report = read_draft(model / "model", "fitted", tiny_config()).training
    assert (report["adapter"]["recall"], report["fit_rows"]) == (2, 40)
    assert train(model, "unfitted", *size) in (0, 2)  # two steps teach nothing
    without = (model / "run-unfitted/metrics.jsonl").read_text().splitlines()[0]
    untrained = json.loads(without)["validation"]["tokens_per_iteration"]
    # It begins from a draft that proposes something.
    assert "as fitted, " in capsys.readouterr().out
    assert report["before"]["tokens_per_iteration"] > untrained + 0.2
    assert run("info", "--model", model / "model", "--json") == 0
    assert json.loads(capsys.readouterr().out)["drafts"]["fitted"]["recall"] == 2


def test_a_draft_has_a_chain_and_the_frequent_tokens_of_its_data(model, capsys):
    parts = ("--steps", "30", "--chain-rank", "6", "--draft-vocab", "20")
    assert train(model, "chained", *parts) == 0
    draft = read_draft(model / "model", "chained", tiny_config())
    ids = np.asarray(draft.params.vocabulary)
    assert ids.shape == (20,) and draft.params.chain["up"].shape == (6, 24)
    assert np.abs(draft.params.chain["up"]).max() > 0  # it has learnt
    report = draft.training
    assert (report["vocabulary"], report["adapter"]["chain_rank"]) == (20, 6)
    lines = [json.loads(line) for line in (model / "own.jsonl").read_text().splitlines()]
    counts = np.bincount(np.concatenate([line["tokens"] for line in lines]), minlength=31)
    missing = np.setdiff1d(np.arange(31), ids)
    assert counts[missing].mean() < counts[ids].mean()
    assert counts[ids].sum() / counts.sum() == pytest.approx(report["vocabulary_coverage"], abs=0.1)
    reached = report["reached"]["tokens_per_iteration"]
    assert 1 < reached <= report["tokens_per_iteration_with_all_tokens"] + 0.1
    out = capsys.readouterr().out
    assert (
        f"20 tokens can be drafted: {report['vocabulary_coverage']:.1%} of the held-out text" in out
    )
    lm = s3d_jax.load(model / "model", draft="chained")
    texts = [lm.generate([[1, 2, 3], [9]], method=m, max_new_tokens=30) for m in ("s3d", "ar")]
    assert [r.tokens for r in texts[0]] == [r.tokens for r in texts[1]]

    again = ("--name", "longer", "--start", "chained", "--steps", "10")
    files = (
        "--model",
        model / "model",
        "--data",
        model / "own.jsonl",
        "--run",
        model / "run-longer",
    )
    small = [
        "--batch-size",
        "8",
        "--row-length",
        "32",
        "--valid-prompts",
        "8",
        "--valid-tokens",
        "24",
    ]
    assert run("train", *files, *again, *small, "--draft-vocab", "9") == 2
    assert "the draft 'chained' drafts 20 tokens, not 9" in capsys.readouterr().err
    assert run("train", *files, *again, *small) == 0
    continued = read_draft(model / "model", "longer", tiny_config())
    np.testing.assert_array_equal(continued.params.vocabulary, ids)
    assert continued.training["before"] == report["reached"]
    assert train(model, "many", "--draft-vocab", "32") == 2
    assert "vocabulary (--draft-vocab) is 32: the model has 31 tokens" in capsys.readouterr().err


def test_masks_alone_train_masks_alone(model):
    assert train(model, "masks", "--mode", "mask", "--steps", "20", "--skip", "") == 0
    lm = s3d_jax.load(model / "model", draft="masks")
    assert lm.draft_config.skip == (False,) * 4
    assert lm.draft_params.deltas == {} and lm.draft_params.bridges == {}
    assert lm.draft_params.mask_embeddings.shape == (2, 24)


@pytest.mark.exhaustive
def test_full_mode_writes_a_new_target_and_leaves_the_old_one(model, capsys):
    before = checkpoint.load(model / "model").params
    out = ("--mode", "full", "--out", model / "full", "--steps", "30", "--learning-rate", "1e-3")
    assert train(model, "default", *out, "--run", model / "run-full") == 0
    assert "perplexity: " in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(model / "model").params, before)
    after = checkpoint.load(model / "full").params
    changed = {
        name
        for name, tree in after.items()
        if any(
            not np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(before[name]), strict=True)
        )
    }
    assert changed == {"layers_0", "layers_3"}  # the layers that the draft runs
    lm = s3d_jax.load(model / "full")
    ar = lm.generate([1, 2, 3], max_new_tokens=40, method="ar")[0]
    assert lm.generate([1, 2, 3], max_new_tokens=40)[0].tokens == ar.tokens


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--skip", "2-9"), "layers 0 to 3"),
        (("--skip", "two"), "--skip takes layers"),
        (("--skip", "2-1"), "--skip takes layers"),
        (("--skip", "2-"), "--skip takes layers"),
        (("--skip", "0-3"), "skips all"),
        (("--skip", ""), "--bridge-rank: no layer is skipped"),
        (("--skip", "", "--recall", "1"), "--bridge-rank, --recall: no layer is skipped"),
        (("--draft-mode", "merged"), "--bridge-rank: no layer is skipped"),
        (
            ("--draft-mode", "merged", "--skip", "1-2", "--rank", "4"),
            "through all layers: it skips none (leave out skip, --skip)",
        ),
        (("--recall", "5"), "recall (--recall) is 5: the model has 4 layers"),
        (
            ("--recall", "1", "--rank", "4", "--bridge-rank", "0"),
            "there are none with bridge_rank 0 (--bridge-rank)",
        ),
        (
            ("--fit-rows", "9", "--rank", "4", "--bridge-rank", "1"),
            "fit_rows (--fit-rows) fits bridges",
        ),
        (("--gamma", "0"), "gamma must be an integer >= 1"),
        (("--out", "x"), "takes no out"),
        (("--data", "nowhere.jsonl"), "cannot read nowhere.jsonl"),
        (("--batch-size", "0"), "batch_size must be at least 1"),
        (("--name", "a/b"), "cannot be the name of a draft"),
        (("--row-length", "1"), "row_length must be at least 2, got 1"),
        (
            ("--row-length", "129"),
            "is 129, but the model is made for 128 tokens",
        ),
        (("--row-length", "0"), "row_length must be at least 2, got 0"),
        (("--seed", "-1"), "seed must be at least 0 and below 4294967296"),
        (("--valid-prompts", "0"), "prompts (--valid-prompts) must be at least 1, got 0"),
        (("--prompt-tokens", "0"), "prompt_tokens must be at least 1, got 0"),
        (("--weight-decay", "-0.1"), "weight_decay must be at least 0, got -0.1"),
        (("--held-out", "1"), "held_out must be above 0 and below 1"),
        (("--held-out", "0.1", "--valid", "x"), "give one of them"),
        (("--next-token-weight", "1"), "--next-token-weight: belongs to --mode full, not adapter"),
        (
            ("--mode", "mask", "--rank", "4", "--bridge-rank", "8"),
            "--rank, --bridge-rank: belong to --mode adapter, not mask",
        ),
        (("--resume",), "holds no run to resume: start without --resume"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_wrong_arguments_are_refused_before_anything_is_written(model, arguments, message, capsys):
    assert train(model, "wrong", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (model / "run-wrong").exists()


def test_skip_is_read_from_ranges_and_lists():
    assert parse_skip("1-2", 4) == (False, True, True, False)
    assert parse_skip("0, 3", 4) == (True, False, False, True)
    assert parse_skip("", 2) == (False, False)


@pytest.mark.exhaustive
def test_a_model_from_scratch(tmp_path, capsys):
    """It memorizes its text, with its own tokenizer, and drafts for itself."""
    sentence = "the small cat sat on the warm mat and saw a bird in the tall tree. "
    texts = tmp_path / "texts.txt"
    texts.write_text("<|endoftext|>".join([sentence * 3] * 30))
    sizes = ("--vocab-size", "280", "--layers", "4", "--width", "32", "--heads", "4")
    more = ("--kv-heads", "2", "--joint-draft", "--draft-weight", "0.5", "--dtype", "float32")
    training = """--steps 150 --batch-size 8 --row-length 48 --anchors 6 --valid-prompts 4
        --valid-tokens 24 --prompt-tokens 6 --validate-every 0 --learning-rate 1e-2
        --ema-decay 0.9"""
    out = ("--out", tmp_path / "model", "--run", tmp_path / "run")
    assert run("pretrain", "--data", texts, *out, *sizes, *more, *training.split()) == 0
    printed = capsys.readouterr().out
    assert float(printed.split("held-out loss: ")[1].split()[0]) < 0.5
    assert float(printed.split("tokens per iteration: ")[1].split()[0]) > 3.0
    lm = s3d_jax.load(tmp_path / "model")
    result = lm.generate("the small cat", max_new_tokens=12)[0]
    assert result.text.startswith(" sat on the warm mat")
    assert result.stats.tokens_per_iteration > 3
    plain = lm.generate("the small cat", max_new_tokens=12, method="ar")[0]
    assert plain.tokens == result.tokens
    assert run("pretrain", "--data", texts, *out, *sizes, *more, *training.split()) == 2
    assert "exists and is not empty: choose another folder" in capsys.readouterr().err


def test_pretrain_refuses_wrong_arguments(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("too little to merge")
    common = ("pretrain", "--data", tmp_path / "t.txt", "--out", tmp_path / "m", "--run")
    assert run(*common, tmp_path / "r", "--vocab-size", "100") == 2
    assert "at least 260" in capsys.readouterr().err
    assert run(*common, tmp_path / "r2", "--vocab-size", "4096") == 2
    assert "give a vocabulary of" in capsys.readouterr().err
    assert run(*common, tmp_path / "r3", "--width", "30", "--heads", "4") == 2
    assert "--width 30 must be a multiple of --heads 4" in capsys.readouterr().err
    (tmp_path / "small.json").write_text(json.dumps(tiny_config().to_dict()))
    for arguments, message in (
        (("--config", tmp_path / "none.json"), "cannot read"),
        (("--config", "x", "--width", "8", "--dtype", "float32"), "--width, --dtype: --config"),
        (("--gamma", "4", "--random-anchors"), "--gamma, --random-anchors: without --joint-draft"),
        (("--rank", "0"), "--rank: without --joint-draft"),
        (("--valid-prompts", "4"), "--valid-prompts: without --joint-draft"),
        (("--joint-draft", "--draft-weight", "-1"), "draft_weight must be at least 0"),
        (("--tokenizer", tmp_path / "none"), "no tokenizer at"),
        (("--config", tmp_path / "small.json"), "is 256, but the model is made for 128"),
        (("--heads", "0"), "heads must be at least 1"),
        (("--resume",), "holds no run to resume"),
    ):
        assert run(*common, tmp_path / "r4", *arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "r4").exists()
    assert not (tmp_path / "m").exists()


def test_python_refuses_what_the_command_refuses(model):
    from s3d_jax.train.runs import train_draft

    arguments = (model / "model", [model / "own.jsonl"], model / "run-x")
    with pytest.raises(ConfigError, match="mode must be one of"):
        TrainDraftConfig(mode="half")
    with pytest.raises(CheckpointError, match="it is, or contains, what is being read"):
        train_draft(*arguments, TrainDraftConfig(mode="full", out=model / "model"))
    with pytest.raises(ConfigError, match="say where the new one goes"):
        train_draft(*arguments, TrainDraftConfig(mode="full"))


def test_the_commands_and_python_have_the_same_defaults(model, monkeypatch):
    from s3d_jax.train import runs

    given = {}
    for name in ("train_draft", "pretrain"):
        monkeypatch.setattr(runs, name, lambda *a, **k: given.update(k, config=a[-1]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("pretrain", "--data", "x", "--out", "y", "--run", "z")
    loop = LoopConfig(OptimizerConfig(learning_rate=3e-3))
    assert given["config"] == PretrainConfig(loop=loop)
    assert (given["valid"], given["resume"], given["overwrite"]) == ([], False, False)
    with pytest.raises(ZeroDivisionError):
        run("train", "--model", model / "model", "--data", "x", "--run", "z")
    draft = DraftConfig((False, True, True, False))
    assert given["config"] == TrainDraftConfig(draft=draft, adapter=AdapterConfig())
    with pytest.raises(ZeroDivisionError):
        run("train", "--model", model / "model", "--data", "x", "--run", "z", "--mode", "full")
    assert given["config"].loop.optimizer.learning_rate == 3e-4


def test_every_option_of_training_reaches_its_setting(model, monkeypatch):
    """Every option of `s3d train` with another value than its default."""
    from s3d_jax.train import runs

    given = {}
    monkeypatch.setattr(runs, "train_draft", lambda *a, **k: given.update(k, config=a[-1]) or 1 / 0)
    options = """--steps 7 --optimizer lion --learning-rate 0.5 --schedule linear --warmup-steps 3
        --weight-decay 0.25 --clip-norm 2 --batch-size 6 --accumulate 3 --ema-decay 0.5 --seed 9
        --log-every 2 --save-every 3 --validate-every 4 --keep-states 5 --remat --row-length 64
        --valid-prompts 11 --prompt-tokens 12 --valid-tokens 13 --held-out 0.5 --gamma 3 --skip 2
        --block-attention bidirectional --rank 2 --bridge-rank 5 --objective kl --decay 0.75
        --recall 1 --anchors 8 --random-anchors --name other --dtype bfloat16 --resume 5 --overwrite
        --fit-rows 70"""
    with pytest.raises(ZeroDivisionError):
        files = ("--model", model / "model", "--data", "x", "--run", "z")
        run("train", *files, *options.split())
    optimizer = OptimizerConfig(7, "lion", 0.5, "linear", 3, weight_decay=0.25, clip_norm=2.0)
    assert given["config"] == TrainDraftConfig(
        loop=LoopConfig(optimizer, 6, 3, 0.5, 9, 2, 3, 4, 5),
        objective=ObjectiveConfig("kl", 0.75, 8, hop=False),
        validation=ValidationConfig(11, 12, 13, 0.5),
        remat=True,
        row_length=64,
        name="other",
        dtype="bfloat16",
        draft=DraftConfig((False, False, True, False), 3, "bidirectional"),
        fit_rows=70,
        adapter=AdapterConfig(2, 5, recall=1),
    )
    assert (given["resume"], given["overwrite"]) == (5, True)
