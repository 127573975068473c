"""What the benchmarks count."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


class Model:
    """S3D takes 2 iterations and 1 s for 6 tokens, AR 2 s; a prompt's first run 100 s more."""

    def __init__(self):
        self.sizes, self.seen = [], set()

    def generate(self, prompts, max_new_tokens, method, gamma=None, adaptive=True):
        self.sizes.append(len(prompts))
        key = (method, *map(tuple, prompts))
        seconds = {"ar": 2.0, "s3d": 1.0}[method] + 100.0 * (key not in self.seen)
        self.seen.add(key)
        stats = SimpleNamespace(
            new_tokens=6, iterations=2, accepted_per_position=(2, 2), decode_seconds=seconds
        )
        return [SimpleNamespace(tokens=[1] * 6, stats=stats) for _ in prompts]


def test_drafts_are_timed_warm_and_batches_give_acceptance_alone():
    compare = runpy.run_path(str(BENCHMARKS / "drafts.py"))["compare"]
    prompts = [[1], [1, 2], [1, 2, 3]]
    single = compare(Model(), prompts, 6, 2)
    assert single["speed_over_ar"] == 2.0 and single["ar_tokens_per_second"] == 3.0
    model = Model()
    batched = compare(model, prompts, 6, 2, batch_size=2)
    assert model.sizes == [2, 2, 1, 1]
    assert batched == {k: v for k, v in single.items() if k in batched}
    assert set(single) - set(batched) == {"speed_over_ar", "ar_tokens_per_second"}
    assert (batched["tokens_per_iteration"], batched["identical"]) == (3.0, 3)
    assert batched["acceptance_per_position"] == [1.0, 1.0]


def test_the_memory_of_training_says_what_is_wrong(monkeypatch):
    arguments = ["training_memory.py", "--layers", "2", "--rows", "2", "--accumulate", "4"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="error: batch_size"):
        runpy.run_path(str(BENCHMARKS / "training_memory.py"), run_name="__main__")


def test_the_soak_finds_what_grows_and_what_differs():
    soak = runpy.run_path(str(BENCHMARKS / "soak.py"))
    calls = [soak["make_call"](i, 2048) for i in range(300)]
    assert calls[7] == soak["make_call"](7, 2048) == json.loads(json.dumps(calls[7]))
    assert {c["kind"] for c in calls} == {"generate", "stream", "left", "conversation"}
    flat, rising = [5.0] * 2000, [5.0] * 500 + [5 + i / 1000 for i in range(1500)]
    assert soak["growth"](flat) == 1 and soak["growth"](rising) == pytest.approx(1.217, abs=1e-3)
    left, texts = dict(kind="left"), dict(kind="generate")
    assert soak["are_same"](left, [[1, 2, 3]], [[1, 2]])  # as far as both were read
    assert not soak["are_same"](left, [[1, 2, 3]], [[1, 3]])
    assert not soak["are_same"](left, [[1]], [[]])
    assert not soak["are_same"](texts, [[1, 2, 3]], [[1, 2]])
    good = dict(different_calls=[], most_memory_maps=50, allowed_memory_maps=100)
    good |= dict(resident_growth=1.04, memory_maps_growth=None)
    assert soak["passes"](good)
    for bad in (
        dict(different_calls=[99]), dict(most_memory_maps=51), dict(resident_growth=1.06),
        dict(memory_maps_growth=1.06),
    ):  # fmt: skip
        assert not soak["passes"](good | bad)


def test_kernels_are_added_up_with_the_time_between_them():
    gpu = runpy.run_path(str(BENCHMARKS / "gpu.py"))
    device, host = "/device:GPU:0", "/host:CPU"
    names = [
        dict(ph="M", name="process_name", pid=pid, args=dict(name=name))
        for pid, name in ((1, device), (2, host))
    ]
    spans = [("gemm.1", 1, 0, 2000), ("gemm.2", 1, 5000, 3000), ("add.3", 1, 7000, 2000)]
    spans += [("python", 2, 0, 99000)]
    events = [dict(ph="X", name=n, pid=p, ts=ts, dur=dur) for n, p, ts, dur in spans]
    found = gpu["kernels"]({"traceEvents": names + events})
    assert found == {
        "milliseconds": 9.0,
        "busy_milliseconds": 6.0,
        "kernels": 3,
        "most": {"gemm": 5.0, "add": 2.0},
    }


def test_what_a_stage_has_found_is_kept(tmp_path):
    gpu = runpy.run_path(str(BENCHMARKS / "gpu.py"))
    texts = {"dtype": "int8", "temperature": 0.0, "prompts": 9, "identical": 8, "tau": 2.5}
    gpu["record"](tmp_path, "exact", texts | {"gaps_where_different": [0.001]})
    gpu["record"](tmp_path, "passes", {"error": "cut off after 3 s"})
    passes = {
        "model": "phi", "precision": "bfloat16", "milliseconds": {"1 row": 4.0, "5 rows": 5.0},
        "over_ar": {"1 row": 1.0, "5 rows": 1.25}, "ar_share_of_bandwidth": 0.8, "weight_gb": 7.6,
        "peak_memory_gb": {"made": 8.1, "ran": 8.2}, "ledger_gb": 7.9,
        "temp_bytes": {"1 row": 1000000, "5 rows": 2000000},
    }  # fmt: skip
    gpu["record"](tmp_path, "passes", passes)
    gpu["record"](tmp_path, "variants", passes | {"variant": "no graphs"})
    before = {k: v for k, v in passes.items() if k != "ledger_gb"}  # as an earlier version found it
    gpu["record"](tmp_path, "variants", before | {"variant": "older", "peak_memory_gb": 9.9})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"stage": "exact", "dty')  # killed
    runpy.run_path(str(BENCHMARKS / "gpu_report.py"))["report"](tmp_path)
    text = (tmp_path / "report.md").read_text()
    exact, timed, variants = text.split("## ")[1:]
    assert "| int8 | 0.0 | 8/9 | 1.0e-03 | 2.50 |" in exact
    assert "| phi | bfloat16 | 4.000 | 1.25 | 80% | 7.60 | 7.90 | 8.10, 8.20 | 2.00 |" in timed
    assert '"error": "cut off after 3 s"' in timed
    assert "| phi | bfloat16 | no graphs | 4.000 |" in variants
    assert "| phi | bfloat16 | older | 4.000 | 1.25 | 80% | 7.60 |  |  | 2.00 |" in variants


@pytest.mark.exhaustive
def test_two_minutes_of_the_gpu_benchmark_find_the_tokens_of_plain_decoding(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu.py", "--out", tmp_path, "--minutes", "2"]
    done = subprocess.run([*command, "--stages", "exact"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(x) for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    about, *found = lines
    assert about["stage"] == "about" and "jax" in about["about"]["versions"]
    greedy = found[0]
    assert (greedy["dtype"], greedy["temperature"], greedy["prompts"]) == ("float32", 0.0, 8)
    assert greedy["identical"] == 8 and 2 < greedy["tau"] <= 5
    errors = [x["error"] for x in found if "error" in x]
    assert errors in ([], ["cut off at the end of its time"])
