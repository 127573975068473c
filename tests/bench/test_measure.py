"""Turns and sums, with contestants whose numbers are known."""

import dataclasses

import numpy as np
import pytest

from s3d_jax.bench import measure, report
from s3d_jax.bench.contestants import Contestant, Run
from s3d_jax.bench.suites import Prompt
from s3d_jax.errors import InputError

PROMPTS = [Prompt(c, np.arange(n, dtype=np.int32)) for c, n in (("a", 1), ("a", 2), ("b", 3))]
CALLS: list[tuple[str, int]] = []


@dataclasses.dataclass(frozen=True)
class Fake(Contestant):
    """Says 10 tokens; takes `speed` seconds for them, in its k-th turn k times as much."""

    speed: float = 1.0
    last: int = 9
    calls: dict = dataclasses.field(default_factory=dict)

    def run(self, prompt, max_new_tokens):
        CALLS.append((self.method, len(prompt)))
        turn = self.calls[len(prompt)] = self.calls.get(len(prompt), -1) + 1
        seconds = self.speed * max(turn, 1) if turn else 99.0
        return Run(
            tokens=[*range(9), self.last if len(prompt) == 3 else 9],
            seconds=seconds + 1,
            first_seconds=0.1 * len(prompt),
            decode_seconds=seconds,
            decoded=10,
            compile_seconds=0.0 if turn else 2.0,
            iterations=4,
            accepted=(4, 2),
        )


@pytest.fixture
def rows(monkeypatch):
    CALLS.clear()
    memory = iter(range(10**6))
    monkeypatch.setattr(measure, "peak_memory_bytes", lambda: 2**30 * (1 + next(memory) % 2))
    contestants = [Fake("ar", {}, 1.0), Fake("s3d", {"gamma": 2}, 0.5, last=8)]
    records = measure.take_turns(contestants, PROMPTS, 10, 3)
    assert len(records) == 2 * 3 * 4
    return measure.summary(contestants, PROMPTS, records, [5.0, 0.0])


def test_everybody_runs_every_prompt_in_turns(rows):
    assert len(CALLS) == 24
    assert [name for name, _ in CALLS[:6]] == ["ar", "s3d", "s3d", "ar", "ar", "s3d"]
    assert [name for name, _ in CALLS[6:8]] == ["s3d", "ar"]  # the next repeat begins otherwise
    assert [n for _, n in CALLS[:6]] == [1, 1, 2, 2, 3, 3]


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
    assert (ar["compile_seconds"], s3d["compile_seconds"]) == (5 + 3 * 2, 3 * 2)
    assert s3d["tokens_per_iteration"] == 2.5 and s3d["acceptance_per_position"] == [1, 0.5]
    assert (s3d["identical_to_ar"], rows[3]["identical_to_ar"]) == (pytest.approx(2 / 3), 1)
    assert rows[5]["identical_to_ar"] == 0
    assert s3d["max_memory_bytes"] == 2 * 2**30 and 1 <= s3d["mean_memory_bytes"] / 2**30 <= 2
    assert s3d["tokens_per_second_per_gib"] == pytest.approx(speeds.mean())


def test_the_fastest_candidate_runs():
    candidates = [Fake("s3d", {"gamma": g}, s) for g, s in ((2, 0.9), (4, 0.3), (6, 0.6))]
    best, compiled = measure.fastest(candidates, PROMPTS[:2], 10)
    assert best.settings == {"gamma": 4} and compiled == 4.0
    assert measure.fastest(candidates[:1], PROMPTS, 10) == (candidates[0], 0.0)
    assert candidates[0].calls == {1: 1, 2: 1}  # nothing to choose, nothing run


def test_the_peak_of_memory_begins_anew():
    measure.reset_peak()
    before = measure.peak_memory_bytes()
    block = np.ones(2**25)
    high = measure.peak_memory_bytes()
    assert high - before > 0.9 * block.nbytes
    size = block.nbytes
    del block
    measure.reset_peak()
    assert high - measure.peak_memory_bytes() > 0.9 * size


def test_table_and_picture(rows, tmp_path):
    found = {
        "about": {"date": "2026-01-01", "command": "s3d bench", "machine": "m", "versions": {}},
        **dict(model="tiny", dtype="float32", suites=["x"], max_new_tokens=10, repeats=3),
        **dict(loaded_memory_bytes=2**29, memory_is="peak", rows=rows),
    }
    for row in rows[1::2]:
        row["settings"]["skip"] = (False, True, True, False, True)
    text = report.table(found)
    (line,) = [x for x in text.splitlines() if x.startswith("| s3d")]
    assert [cell.strip() for cell in line.split("|")[1:8]] == [
        *("s3d γ=2, skip 1-2,4", "12.2 ± 6.9", "2.00 ± 0.00", "5.2", "200.0 ± 0.0 ms"),
        *("6.0 s", "2.50"),
    ]
    assert text.count("\n| b ") == 2 and "Memory after loading: 0.50 GiB" in text
    report.draw(found, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in tmp_path.iterdir()] == ["b.png"]
    with pytest.raises(InputError, match=r"the name of a \.png file in an existing folder"):
        report.check_plot(tmp_path / "none" / "b.png")
