"""The command `s3d bench`, small, on real models; and what it refuses."""

import json
import shutil
import sys

import pytest

import convert
import s3d_jax
from s3d_jax.bench.external import hf_models
from s3d_jax.bench.report import label
from s3d_jax.commands.bench import parse_methods
from s3d_jax.commands.main import main
from s3d_jax.drafters.stored import save_draft
from s3d_jax.engine.batch import Batch
from s3d_jax.errors import InputError
from s3d_jax.lm import EMBEDDED
from s3d_jax.nn.draft import untrained_draft
from s3d_jax.settings.drafting import DraftConfig
from tests.bench import llama_cpp_stand_in
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
    methods = "s3d:gamma=2,two-model:gamma=3,hf,hf-prompt-lookup:gamma=3,hf:dtype=bfloat16"
    command = ["bench", "--model", models[0], "--draft-model", models[1], "--suite", str(suite)]
    command += ["--methods", methods, "--max-new-tokens", "24", "--repeats", "1", "--json"]
    assert main([*command, "--plot", str(tmp_path / "b.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (tmp_path / "b.png").stat().st_size > 10_000
    rows = [row for row in found["rows"] if row["category"] == "all"]
    names = ["ar", "s3d", "two-model", "hf", "hf-prompt-lookup"]
    half = rows.pop()
    assert half["method"] == "hf" and half["settings"] == {"dtype": "bfloat16"}
    assert half["memory_bytes"] == rows[3]["memory_bytes"] / 2
    assert [row["method"] for row in rows] == names
    assert len(found["rows"]) == 3 * (len(names) + 1)
    for row in rows:
        assert row["identical_to_ar"] == 1 and row["identical_prompts"] == row["prompts"] == 2
        assert row["new_tokens"] == 48
        assert row["tokens_per_second"] > 0 < row["first_token_seconds"]
        assert row["max_process_bytes"] >= row["mean_process_bytes"] > 2**27
        assert 2**20 < row["memory_bytes"] < 2**23  # 260 thousand floats, and caches
    assert rows[0]["improvement_factor"] == rows[0]["tokens_per_iteration"] == 1
    assert rows[0]["compile_seconds"] > 0 and rows[3]["compile_seconds"] == 0
    assert rows[2]["tokens_per_iteration"] > 1.5 and len(rows[2]["acceptance_per_position"]) == 3
    assert rows[3]["tokens_per_iteration"] is None
    assert rows[3]["settings"] == {"dtype": "float32"} and found["precision"] == "float32"
    assert found["loaded_memory_bytes"] > 2**27 and found["about"]["versions"]["jax"]


def test_several_drafts_of_a_model_in_one_run(models, tmp_path, capsys):
    folder = shutil.copytree(models[0], tmp_path / "model")
    lm = s3d_jax.load(folder)
    layers = lm.config.num_layers
    for name, skipped in (("default", 1), ("deep", 0)):
        draft = DraftConfig((False,) * (layers - skipped) + (True,) * skipped, 2)
        save_draft(folder, name, draft, untrained_draft(lm.config, lm.params), {})
    suite = tmp_path / "one.jsonl"
    suite.write_text('{"prompt": "Once upon a time"}')
    command = ["bench", "--model", str(folder), "--suite", str(suite), "--max-new-tokens", "24"]
    always = "s3d:gamma=1:copies=no:adaptive=no"
    methods = f"{always},{always}:draft=deep"
    assert main([*command, "--methods", methods, "--repeats", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["settings"].get("draft") for row in rows] == [None, None, "deep"]
    # The whole model as a draft is always right, and only the row that names it uses it.
    assert rows[2]["acceptance_per_position"] == [1.0] != rows[1]["acceptance_per_position"]
    assert rows[2]["identical_prompts"] == rows[1]["identical_prompts"] == 1
    assert label(rows[2]).startswith("s3d draft deep, γ=1")
    assert main([*command, "--methods", "s3d:draft=x"]) == 2
    assert "has no draft 'x': it has deep, default" in capsys.readouterr().err
    assert main([*command, "--methods", "s3d:draft=deep,eagle:draft=deep"]) == 2
    assert "is of the kind 's3d', not 'eagle'" in capsys.readouterr().err


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
    found = parse_methods("hf:dtype=bfloat16,hf-prompt-lookup:dtype=float32:gamma=3,llama.cpp")
    assert found[1:] == [
        ("hf", {"dtype": "bfloat16"}),
        ("hf-prompt-lookup", {"dtype": "float32", "gamma": 3}),
        ("llama.cpp", {}),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "hydra"], "--methods names 'hydra'; known are s3d, ar"),
        (["--methods", "s3d:gamma=x"], "'s3d:gamma=x' is not understood"),
        (["--methods", "s3d:gamma=0"], "'s3d:gamma=0' is not understood"),
        (["--methods", "hf:gamma=2"], "hf has no gamma"),
        (["--methods", "self-spec:draft=x"], "self-spec has no draft of the model"),
        (["--methods", "s3d:draft="], "'s3d:draft=' is not understood"),
        (["--methods", "hf:dtype=int8"], "'hf:dtype=int8' is not understood"),
        (["--methods", "llama.cpp:gamma=2"], "llama.cpp has no gamma"),
        (["--methods", "llama.cpp"], "give --gguf FILE"),
        (["--gguf", "m.gguf"], "--gguf is for llama.cpp"),
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
        hf_models(EMBEDDED, ["float32"])


def test_llama_cpp_next_to_our_methods(models, tmp_path, monkeypatch, capsys):
    lm = s3d_jax.load(models[0])
    ids = [[1, 403], [1, 410, 5]]
    answers = {tuple(p): lm.generate(p, max_new_tokens=9, method="ar")[0].tokens for p in ids}
    answers[tuple(ids[1])][3] += 1  # as by other weights
    texts = lm.tokenizer.convert_ids_to_tokens(range(512))
    calls = llama_cpp_stand_in.install(monkeypatch, texts, answers)
    suite, file = tmp_path / "two.jsonl", tmp_path / "m.gguf"
    suite.write_text("\n".join(json.dumps({"prompt_tokens": p}) for p in ids))
    file.touch()
    command = ["bench", "--model", models[0], "--suite", str(suite), "--gguf", str(file)]
    command += ["--methods", "llama.cpp,llama.cpp-prompt-lookup", "--repeats", "1"]
    assert main([*command, "--max-new-tokens", "8"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(" 1/2 ") == 2 and shown.count(" 2/2 ") == 1 and "llama_cpp 0.3.36" in shown
    assert "| llama.cpp Q4_K - Medium " in shown and "| llama.cpp-prompt-lookup γ=" in shown
    loaded = [call[2]["logits_all"] for call in calls if call[0] == "Llama"]
    assert loaded == [False, True]  # once each, whatever settings are tried


def test_the_suites_that_a_model_gets(tmp_path, monkeypatch, capsys):
    def read(names, *_):
        raise InputError(f"asked for {', '.join(names)}")

    monkeypatch.setattr("s3d_jax.texts.suites.read_suites", read)
    folder = tmp_path / "chat"  # a copy knows no more, but has a template
    shutil.copytree(EMBEDDED, folder)
    for options, names in (
        (["--model", str(folder)], "chat"),
        (["--model", str(folder), "--suite", "code"], "code"),
        ([], "stories, dialogues"),
    ):
        assert main(["bench", *options]) == 2
        assert f"asked for {names}\n" in capsys.readouterr().err
