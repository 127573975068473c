"""Turns and sums, with contestants whose numbers are known."""

import dataclasses
import errno
import itertools
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from s3d_jax.bench import measure, report
from s3d_jax.bench.contestants import Contestant, Ours, Run
from s3d_jax.errors import InputError
from s3d_jax.lm import LM
from s3d_jax.settings.drafting import PassCosts, Tuning
from s3d_jax.texts.suites import Prompt
from tests.tiny import tiny_config, tiny_lm, tiny_params

PROMPTS = [Prompt(c, np.arange(n, dtype=np.int32)) for c, n in (("a", 1), ("a", 2), ("b", 3))]
CALLS: list[tuple[str, int]] = []


@dataclasses.dataclass(frozen=True)
class Fake(Contestant):
    """Says 10 tokens; takes `speed` seconds for them, in its k-th turn k times as much."""

    speed: float = 1.0
    last: int = 9
    calls: dict = dataclasses.field(default_factory=dict)

    def run(self, prompt, max_new_tokens):
        length = len(prompt.tokens)
        CALLS.append((self.method, length))
        turn = self.calls[length] = self.calls.get(length, -1) + 1
        seconds = self.speed * max(turn, 1) if turn else 99.0
        return Run(
            tokens=[*range(9), self.last if length == 3 else 9],
            seconds=seconds + 1,
            first_seconds=0.1 * length,
            decode_seconds=seconds,
            decoded=10,
            compile_seconds=0.0 if turn else 2.0,
            iterations=4,
            accepted=(4, 2),
        )

    def memory_bytes(self, prompt, max_new_tokens):
        return round(self.speed * 2**30) * len(prompt.tokens)


@pytest.fixture
def rows(monkeypatch):
    CALLS.clear()
    memory = iter(range(10**6))
    monkeypatch.setattr(measure, "peak_memory_bytes", lambda: 2**30 * (1 + next(memory) % 2))
    contestants = [Fake("ar", {}, 1.0), Fake("s3d", {"gamma": 2}, 0.5, last=8)]
    records = measure.take_turns(contestants, PROMPTS, 10, 3)
    assert len(records) == 2 * 3 * 4
    return measure.summary(contestants, PROMPTS, records, 10)


def test_an_output_that_changes_from_turn_to_turn_is_not_identical():
    """Such as those of another library, whose sums depend on threads."""

    class Moody(Fake):
        def run(self, prompt, max_new_tokens):
            run = super().run(prompt, max_new_tokens)
            return dataclasses.replace(run, tokens=[1]) if self.calls[1] == 2 else run

    contestants = [Fake("ar", {}), Moody("llama.cpp", {})]
    records = measure.take_turns(contestants, PROMPTS[:1], 10, 3)
    row = measure.summary(contestants, PROMPTS[:1], records, 10)[1]
    assert row["identical_prompts"] == 0 and row["identical_to_ar"] == pytest.approx(2 / 3)


def test_what_prefill_gives_is_of_no_iteration():
    """τ counts the tokens of the iterations: of HF and llama.cpp all after the first."""
    run = Run([1] * 10, 2, 1, 1, decoded=9, iterations=9)
    assert measure._acceptance([run])["tokens_per_iteration"] == 1


def test_everybody_runs_every_prompt_in_turns(rows):
    assert len(CALLS) == 24
    assert [name for name, _ in CALLS[:6]] == ["ar", "s3d"] * 3  # ar compiles what both need
    assert [n for _, n in CALLS] == [1, 1, 2, 2, 3, 3] * 4
    assert {tuple(name for name, _ in CALLS[i : i + 2]) for i in range(6, 24, 2)} == {
        *(("ar", "s3d"), ("s3d", "ar"))
    }


@pytest.mark.parametrize("count", [3, 4, 6])
@pytest.mark.parametrize("prompts", [1, 8, 12])
def test_everybody_follows_everybody_about_equally_often(count, prompts):
    contestants = [Fake(str(c), {}) for c in range(count)]
    records = measure.take_turns(contestants, PROMPTS[:1] * prompts, 10, 24 // min(prompts, 12))
    names = [r.contestant for r in records if r.repeat > 0]
    turns = [names[i : i + count] for i in range(0, len(names), count)]
    assert all(sorted(turn) == list(range(count)) for turn in turns)
    followed = Counter(itertools.pairwise(names))
    others = [followed[a, b] for a in range(count) for b in range(count) if a != b]
    assert max(others) - min(others) <= 2 and min(others) >= len(turns) / count - 1


def test_sums(rows):
    assert [(r["category"], r["method"], r["prompts"]) for r in rows] == [
        *(("all", "ar", 3), ("all", "s3d", 3), ("a", "ar", 2)),
        *(("a", "s3d", 2), ("b", "ar", 1), ("b", "s3d", 1)),
    ]
    ar, s3d = rows[:2]
    # Turns of 1, 2 and 3 seconds: 10, 5 and 3.33 tokens per second. The first, of 99, warms up.
    speeds = np.array([10, 5, 10 / 3])
    assert ar["tokens_per_second"] == pytest.approx(speeds.mean())
    assert ar["tokens_per_second_spread"] == pytest.approx(speeds.std(ddof=1))
    assert s3d["tokens_per_second"] == pytest.approx(2 * speeds.mean())
    assert (s3d["improvement_factor"], s3d["improvement_factor_spread"]) == pytest.approx((2, 0))
    assert ar["end_to_end_tokens_per_second"] == pytest.approx(np.mean([10 / 2, 10 / 3, 10 / 4]))
    assert ar["first_token_seconds"] == pytest.approx(0.2)
    assert ar["compile_seconds"] == s3d["compile_seconds"] == 3 * 2
    assert s3d["tokens_per_iteration"] == 2.5 and s3d["acceptance_per_position"] == [1, 0.5]
    assert (s3d["identical_to_ar"], rows[3]["identical_to_ar"]) == (pytest.approx(2 / 3), 1)
    assert rows[5]["identical_to_ar"] == 0
    assert [row["identical_prompts"] for row in rows] == [3, 2, 2, 2, 1, 0]
    assert s3d["max_process_bytes"] == 2 * 2**30 and 1 <= s3d["mean_process_bytes"] / 2**30 <= 2
    # What a method needs for the longest prompt: 1 GiB per token and second of its own.
    assert (ar["memory_bytes"], s3d["memory_bytes"]) == (3 * 2**30, 1.5 * 2**30)
    assert rows[2]["memory_bytes"] == 2 * 2**30
    assert s3d["tokens_per_second_per_gib"] == pytest.approx(2 * speeds.mean() / 1.5)


def test_the_fastest_candidate_runs():
    candidates = [Fake("s3d", {"gamma": g}, s) for g, s in ((2, 0.9), (4, 0.3), (6, 0.6))]
    assert measure.fastest(candidates, PROMPTS[:2], 10).settings == {"gamma": 4}
    assert measure.fastest(candidates[:1], PROMPTS, 10) is candidates[0]
    assert candidates[0].calls == {1: 1, 2: 1}  # nothing to choose, nothing run


def test_what_our_methods_need_is_computed():
    small = tiny_lm(1, num_layers=1)
    lm = LM(tiny_config(), tiny_params(tiny_config()), draft_model=small)
    prompt = Prompt("a", np.arange(1, 9, dtype=np.int32))
    needs = {
        method: Ours(method, {}, lm).memory_bytes(prompt, 16)
        for method in ("ar", "s3d", "self-spec", "two-model")
    }
    slots = 64  # of 8 + 16 tokens and the slack
    cache = 2 * 2 * 10 * slots * 4  # keys and values, 2 heads of 10, float32; of each layer
    assert needs["ar"] == needs["self-spec"] == size(lm.params) + 4 * cache
    assert needs["s3d"] == needs["ar"] + size(lm.draft_params)
    lengths = 2 * 4  # of the row and its prompt, in the second cache
    assert needs["two-model"] == needs["ar"] + size(small.params) + cache + lengths


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_what_ran_is_told():
    lm = tiny_lm()
    told = {
        name: report.label({"method": name, "settings": Ours(name, {}, lm).in_full()})
        for name in ("ar", "s3d", "prompt-lookup", "self-spec", "early-exit")
    }
    assert told == {
        "ar": "ar",
        "s3d": "s3d γ=4, measured costs, copies",
        "prompt-lookup": "prompt-lookup γ=4, ngram=3",
        "self-spec": "self-spec γ=4, skip 1-2",
        "early-exit": "early-exit γ=4, skip 2-3",
    }
    assert Ours("s3d", {"adaptive": False}, lm).in_full() == {"gamma": 4, "adaptive": False}
    skip = (False, True, False, False)
    lm.tuning = Tuning(2, skip, PassCosts(0.5, (1, 1.1, 1.2)), 1.25)
    full = Ours("s3d", {}, lm).in_full()
    assert full == {"gamma": 2, "skip": skip, "adaptive": True, "costs": "tuned", "copies": True}
    assert Ours("s3d", {"gamma": 3}, lm).in_full()["costs"] == "measured"


def test_the_command_can_be_typed_again(monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    for program, shown in (
        ("/usr/bin/s3d", "s3d"),
        ("/lib/s3d_jax/__main__.py", "s3d"),
        ("benchmarks/adaptive.py", "python benchmarks/adaptive.py"),
    ):
        monkeypatch.setattr("sys.argv", [program, "--suite", "two words.jsonl"])
        assert report.about()["command"] == f"{shown} --suite 'two words.jsonl'"
    monkeypatch.setenv("NPROC", "1")
    assert report.about()["command"].startswith("NPROC=1 python ")


def full_disk(figure, path, **_):
    Path(path).write_text("a part")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_table_and_picture(rows, tmp_path, monkeypatch):
    found = {
        "about": {"date": "2026-01-01", "command": "s3d bench", "machine": "m", "versions": {}},
        **dict(model="tiny", precision="int8", suites=["x"], max_new_tokens=10, repeats=3),
        **dict(loaded_memory_bytes=2**29, memory_is="resident set", rows=rows),
    }
    for row in rows[1::2]:
        row["settings"]["skip"] = (False, True, True, False, True)
    text = report.table(found)
    (line,) = [x for x in text.splitlines() if x.startswith("| s3d")]
    assert [cell.strip() for cell in line.split("|")[1:8]] == [
        *("s3d γ=2, skip 1-2,4", "12.2 ± 6.9", "2.00 ± 0.00", "5.2", "200.0 ± 0.0 ms"),
        *("6.0 s", "2.50"),
    ]
    assert [cell.strip() for cell in line.split("|")[-4:-1]] == ["2/3", "1,536.0 MiB", "8.1"]
    (part,) = [x for x in text.splitlines() if x.startswith("| a ") and "s3d" in x]
    assert [cell.strip() for cell in part.split("|")[-5:-1]] == [
        "2.50",
        "2/2",
        "1,024.0 MiB",
        "12.2",
    ]
    assert text.startswith("tiny, int8: ") and text.count("\n| b ") == 2
    assert "resident set, with all methods in it: 0.50 GiB after loading, 2.00 GiB at" in text
    report.draw(found, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in tmp_path.iterdir()] == ["b.png"]
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full_disk)
    with pytest.raises(InputError, match=r"cannot write .*c\.png: .*give --plot another place"):
        report.draw(found, tmp_path / "c.png")
    assert [p.name for p in tmp_path.iterdir()] == ["b.png"]
    with pytest.raises(InputError, match=r"the name of a \.png file in an existing folder"):
        report.check_plot(tmp_path / "none" / "b.png")
