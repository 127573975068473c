"""The command `s3d bench`, small, on real models; and what it refuses."""

import json
import sys

import pytest

import convert
from s3d_jax.bench.contestants import hf_model
from s3d_jax.commands.bench import parse_methods
from s3d_jax.commands.main import main
from s3d_jax.engine.batch import Batch
from s3d_jax.errors import InputError
from s3d_jax.lm import EMBEDDED
from tests.conftest import need
from tests.sampled import sampled


@pytest.fixture(scope="module")
def models(data_dir, tmp_path_factory) -> list[str]:
    folders = [tmp_path_factory.mktemp("bench") / name for name in ("big", "small")]
    for folder, name in zip(folders, ("stories260k", "stories280k-draft"), strict=True):
        source = data_dir / "checkpoints" / name
        convert.convert(source, folder, parity=False, progress=False)
    return list(map(str, folders))


@pytest.fixture
def one_thread():
    """Torch's threads wait in a busy loop, and would take the cores from jax."""
    torch = need("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_all_kinds_of_methods_in_one_run(models, one_thread, tmp_path, capsys):
    suite = tmp_path / "two.jsonl"
    prompts = [{"prompt": "Once upon a time"}, {"prompt": "The dog", "category": "dogs"}]
    suite.write_text("\n".join(map(json.dumps, prompts)))
    methods = "s3d:gamma=2,two-model:gamma=3,hf,hf-prompt-lookup:gamma=3"
    command = ["bench", "--model", models[0], "--draft-model", models[1], "--suite", str(suite)]
    command += ["--methods", methods, "--max-new-tokens", "24", "--repeats", "1", "--json"]
    assert main([*command, "--plot", str(tmp_path / "b.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (tmp_path / "b.png").stat().st_size > 10_000
    rows = [row for row in found["rows"] if row["category"] == "all"]
    names = ["ar", "s3d", "two-model", "hf", "hf-prompt-lookup"]
    assert [row["method"] for row in rows] == names
    assert len(found["rows"]) == 3 * len(names)
    for row in rows:
        assert row["identical_to_ar"] == 1 and row["new_tokens"] == 48 and row["prompts"] == 2
        assert row["tokens_per_second"] > 0 < row["first_token_seconds"]
        assert row["max_process_bytes"] >= row["mean_process_bytes"] > 2**27
        assert 2**20 < row["memory_bytes"] < 2**23  # 260 thousand floats, and caches
    assert rows[0]["improvement_factor"] == rows[0]["tokens_per_iteration"] == 1
    assert rows[0]["compile_seconds"] > 0 and rows[3]["compile_seconds"] == 0
    assert rows[2]["tokens_per_iteration"] > 1.5 and len(rows[2]["acceptance_per_position"]) == 3
    assert rows[3]["tokens_per_iteration"] is None
    assert rows[3]["settings"] == {"dtype": "float32"} and found["precision"] == "float32"
    assert found["loaded_memory_bytes"] > 2**27 and found["about"]["versions"]["jax"]


def test_the_best_setting_is_looked_for(models, tmp_path, capsys):
    suite = tmp_path / "one.jsonl"
    suite.write_text('{"prompt": "Once upon a time"}')
    command = ["bench", "--model", models[0], "--suite", str(suite), "--methods", "prompt-lookup"]
    assert main([*command, "--max-new-tokens", "8", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| prompt-lookup γ=") for line in lines)
    assert sum(line.startswith("| ") for line in lines) == 3  # head, ar, prompt-lookup


@pytest.mark.parametrize(
    "methods",
    sampled(["s3d,two-model", "s3d:gamma=2,two-model:gamma=2"], ["s3d:gamma=2,two-model:gamma=2"]),
)
def test_who_is_charged_for_compiling(methods, models, tmp_path, monkeypatch, capsys):
    """What all need counts for plain decoding, and what a method needs for that, tried or given."""
    compile_one = Batch._program

    def counted(self, *arguments):
        seconds, before = self._compile_seconds, len(self._programs)
        program = compile_one(self, *arguments)
        self._compile_seconds = seconds + len(self._programs) - before
        return program

    monkeypatch.setattr(Batch, "_program", counted)
    suite = tmp_path / "one.jsonl"
    suite.write_text('{"prompt": "Once upon a time there was"}')
    command = ["bench", "--model", models[0], "--suite", str(suite), "--max-new-tokens", "8"]
    command += ["--draft-model", models[1], "--repeats", "1", "--json"]
    assert main([*command, "--methods", methods]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    charged = {row["method"]: row["compile_seconds"] for row in rows}
    # A prefill and a loop; the loop; a loop and two prefills next to the second cache.
    assert charged == {"ar": 2, "s3d": 1, "two-model": 2}


def test_a_row_that_was_given_twice_runs_once(models, tmp_path, capsys):
    suite = tmp_path / "one.jsonl"
    suite.write_text('{"prompt": "Once upon a time"}')
    command = ["bench", "--model", models[0], "--suite", str(suite), "--max-new-tokens", "4"]
    methods = "prompt-lookup:gamma=4,prompt-lookup:gamma=4:ngram=3,s3d:gamma=2:adaptive=no"
    assert main([*command, "--methods", methods, "--repeats", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("| prompt-lookup γ=4, ngram=3 ") == 1 and "| s3d γ=2, fixed " in shown


def test_entries_of_methods():
    assert parse_methods("s3d,ar") == [("ar", {}), ("s3d", {})]
    found = parse_methods("self-spec:gamma=2:skip=3-5, prompt-lookup:ngram=2,s3d:skip=1")
    assert found[1:] == [
        ("self-spec", {"gamma": 2, "skip": range(3, 6)}),
        ("prompt-lookup", {"ngram": 2}),
        ("s3d", {"skip": range(1, 2)}),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "medusa"], "--methods names 'medusa'; known are s3d, ar"),
        (["--methods", "s3d:gamma=x"], "'s3d:gamma=x' is not understood"),
        (["--methods", "s3d:gamma=0"], "'s3d:gamma=0' is not understood"),
        (["--methods", "hf:gamma=2"], "hf has no gamma"),
        (["--methods", "s3d:skip=6-3"], "'s3d:skip=6-3' is not understood"),
        (["--methods", "s3d:gamma=4:gamma=6"], "has the same setting twice"),
        (["--methods", "self-spec:skip=50-60"], "skip layer 60; the model has layers 0 to 9"),
        (["--methods", "s3d:skip=3-100"], "skip layer 100; the model has layers 0 to 9"),
        (["--max-new-tokens", "100000"], "--max-new-tokens leaves none for a prompt"),
        (["--methods", "self-spec:ngram=2"], "'self-spec' has no ngram"),
        (["--methods", "two-model"], "needs a second model"),
        (["--repeats", "0"], "repeats must be at least 1"),
        (["--limit", "0"], "limit must be at least 1"),
        (["--plot", "nowhere/b.png"], "--plot takes the name of a .png"),
        (["--suite", "poems"], "'poems' is no suite"),
    ],
)
def test_mistakes_are_said_before_anything_runs(options, message, capsys):
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"need torch: pip install 's3d-jax\[torch\]'"):
        hf_model(EMBEDDED, "float32").__enter__()
