"""Distilling: the target's own answers, as data for a draft."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import s3d_jax
from s3d_jax.drafters.stored import save_draft
from s3d_jax.errors import ConfigError, InputError
from s3d_jax.settings.training import DistillConfig, PromptsConfig
from s3d_jax.texts.documents import Document
from s3d_jax.train.distill import distill, prompts_of
from tests.tiny import tiny_lm
from tests.train.command import run


def test_distilled_lines_are_the_targets_output_and_a_cut_off_file_is_continued(model, tmp_path):
    lm = tiny_lm()
    prompts = [[i, i + 1] for i in range(10)]
    config = DistillConfig(max_new_tokens=8, batch_size=4, sampled_fraction=0.5, seed=3)
    whole = distill(lm, prompts, tmp_path / "whole.jsonl", config)
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [line["prompt_tokens"] for line in lines] == prompts
    assert [line["temperature"] for line in lines] == [0.0, 1.0] * 5
    greedy = lm.generate(prompts[::2], max_new_tokens=8, method="ar")
    assert [line["tokens"] for line in lines[::2]] == [r.tokens for r in greedy]
    assert len({tuple(line["tokens"]) for line in lines[1::2]}) == 5

    with pytest.raises(InputError, match="exists: choose another file"):
        distill(lm, prompts, whole, config)

    text, other = whole.read_text(), tmp_path / "other.jsonl"
    partial = interrupted(lm, prompts, other, config)
    partial.write_text(partial.read_text() + '{"prompt_tokens": [8')  # cut off by a kill
    assert distill(lm, prompts, other, config).read_text() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.jsonl", "whole.jsonl"]


def interrupted(lm, prompts, out, config):
    """Distills until four lines are written or more; returns the partial file."""
    partial = out.with_name(out.name + ".partial")

    class Interrupted(type(lm)):
        def generate_many(self, *arguments, **more):
            for found in super().generate_many(*arguments, **more):
                if len(partial.read_text().splitlines()) >= 4:
                    raise KeyboardInterrupt
                yield found

    with pytest.raises(KeyboardInterrupt):
        distill(Interrupted(lm.config, lm.params), prompts, out, config)
    assert 4 <= len(partial.read_text().splitlines()) < len(prompts)
    return partial


def test_what_another_call_left_unfinished_is_not_continued(tmp_path):
    lm = tiny_lm()
    prompts, out = [[i, i + 1] for i in range(7)], tmp_path / "own.jsonl"
    config = DistillConfig(max_new_tokens=4, batch_size=2, seed=3)
    partial = interrupted(lm, prompts, out, config)
    for change, message in (
        (dict(max_new_tokens=5), "max_new_tokens was 4, is now 5"),
        (dict(temperature=0.5), "temperature was 1.0, is now 0.5"),
    ):
        with pytest.raises(InputError, match=message):
            distill(lm, prompts, out, dataclasses.replace(config, **change))
    with pytest.raises(InputError, match="target/model was None, is now 'b'"):
        distill(lm, prompts, out, config, identity={"model": "b"})
    with pytest.raises(InputError, match="prompts was 7, is now 6; prompts_sha256"):
        distill(lm, prompts[1:], out, config)
    assert len(partial.read_text().splitlines()) >= 4
    fresh = distill(lm, prompts[1:], out, config, overwrite=True).read_text()
    assert [json.loads(x)["prompt_tokens"] for x in fresh.splitlines()] == prompts[1:]
    partial.write_text(fresh)
    out.unlink()
    with pytest.raises(InputError, match="its options are not known"):
        distill(lm, prompts[1:], out, config)


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "no prompts"),
        ([[1], []], "prompt 1 is empty"),
        ([[1], [31]], "prompt 1 holds token 31"),
        ([[1], [1] * 127, [1] * 128], "1 of 3 prompts .*: prompt 2 has 128 tokens"),
    ],
)
def test_wrong_prompts_are_refused_before_the_first_one_is_continued(prompts, message, tmp_path):
    with pytest.raises(InputError, match=message):
        distill(tiny_lm(), prompts, tmp_path / "x.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"sampled_fraction": 2}, "sampled_fraction must be at least 0 and at most 1, got 2"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_wrong_settings_of_distilling_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DistillConfig(**options)


def test_prompts_are_beginnings_of_texts_or_whole_ones():
    def document(size, prompt_tokens=None):
        return Document(np.arange(size), np.ones(size, bool), prompt_tokens)

    documents = [document(5), document(3), document(9, 7), document(0), document(4, 0)]
    lengths = lambda *a: [len(p) for p in prompts_of(documents, PromptsConfig(*a))]  # noqa: E731
    assert lengths(None, 4) == [4, 3, 7, 4]
    assert lengths(None, 5) == [5, 3, 7, 4]
    assert lengths(3, 1, True) == [5, 3, 7]
    assert lengths(3, 1, True, 5) == [5, 3, 4]
    with pytest.raises(InputError, match=r"all 4 prompts have more than 2 tokens \(--longest"):
        lengths(3, 1, True, 2)


def test_distilling_needs_no_choice_of_a_draft(model, tmp_path, capsys):
    shutil.copytree(model / "model", tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "drafts", ignore_errors=True)
    lm = s3d_jax.load(tmp_path / "model")
    for name in ("a", "b"):
        save_draft(tmp_path / "model", name, lm.draft_config, lm.draft_params, {})
    common = ("distill", "--model", tmp_path / "model", "--prompts", model / "prompts.jsonl")
    common += ("--limit", "2", "--max-new-tokens", "4", "--batch-size", "2")
    assert run(*common, "--out", tmp_path / "1.jsonl") == 0
    assert run(*common, "--out", tmp_path / "2.jsonl", "--draft", "b") == 0
    assert run(*common, "--out", tmp_path / "3.jsonl", "--draft", "c") == 2
    assert "has no draft 'c': it has a, b" in capsys.readouterr().err
    more = ("--whole-prompts", "--prompt-tokens", "3")
    assert run(*common, "--out", tmp_path / "4.jsonl", *more) == 2
    assert "leave out --prompt-tokens" in capsys.readouterr().err
