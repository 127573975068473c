"""The command `s3d`: output, JSON, exit codes, help."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import convert
import s3d_jax
from s3d_jax.commands.main import main
from s3d_jax.engine.prompts import PromptEncoder

STATS = """iterations drafted accepted tokens_per_iteration prefill_seconds decode_seconds
    compile_seconds peak_memory_bytes"""


@pytest.fixture(scope="module")
def native(data_dir, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("cli") / "baby"
    source = data_dir / "checkpoints" / "babyllama-1m"
    convert.convert(source, folder, parity=False, progress=False)
    return str(folder)


def test_generate_prints_the_text(native, capsys):
    code = main(["generate", "Once upon a time", "--model", native, "--max-new-tokens", "40"])
    out, err = capsys.readouterr()
    assert code == 0
    assert out == "Once upon a time, there was a little girl named Lily. Sh\n"
    assert "40 tokens" in err and "per iteration" in err


def test_generate_json_one_object_per_prompt_and_methods_agree(native, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("The dog\n"))
    texts = {}
    for method in ("s3d", "ar"):
        monkeypatch.setattr("sys.stdin", io.StringIO("The dog\n"))
        arguments = ["generate", "Once", "-", "--model", native, "--max-new-tokens", "25", "--json"]
        assert main([*arguments, "--method", method, "--gamma", "3", "--no-adaptive"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["prompt"] for row in rows] == ["Once", "The dog"]
        for row in rows:
            assert set(row["stats"]) >= set(STATS.split())
            assert len(row["tokens"]) == 25 and row["finish_reason"] == "length"
            assert row["stats"]["drafted"] == (
                3 * row["stats"]["iterations"] if method == "s3d" else 0
            )
        texts[method] = [(row["text"], row["tokens"]) for row in rows]
    assert texts["ar"] == texts["s3d"]


def test_sampling_options_reach_the_model(native, capsys):
    base = ["generate", "Once", "--model", native, "--max-new-tokens", "30", "--json"]
    seen = set()
    for extra in ([], ["--temperature", "1.5"], ["--temperature", "1.5", "--seed", "1"]):
        assert main(base + extra) == 0
        seen.add(json.loads(capsys.readouterr().out)["text"])
    assert len(seen) == 3
    assert main([*base, "--temperature", "1.5", "--top-k", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] in seen  # top-1 is greedy
    assert main([*base, "--stop", "a"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["finish_reason"], row["stopped_by"]) == ("stop", "a") and "a" not in row["text"]


def test_skip_names_the_layers_that_the_draft_skips(native, capsys):
    """More layers skipped, fewer tokens accepted, the same text; one of none is always right."""
    base = ["generate", "Once upon", "--model", native, "--max-new-tokens", "30", "--json"]
    found = {}
    for skip in ("", "1-4", "1, 3"):
        assert main([*base, "--skip", skip, "--gamma", "1", "--no-adaptive"]) == 0
        row = json.loads(capsys.readouterr().out)
        found[skip] = row["text"], row["stats"]["tokens_per_iteration"]
    assert len({text for text, _ in found.values()}) == 1
    assert found[""][1] == 2.0 > found["1-4"][1] and found["1, 3"][1] < 2.0
    for options, message in (
        (["--skip", "9"], "--skip 9: the model has the layers 0 to 4"),
        (["--skip", "two"], "--skip takes layers like"),
        (["--skip", "0-4"], "skips all"),
        (["--skip", "1", "--method", "prompt-lookup"], "has no skip"),
    ):
        assert main([*base, *options]) == 2
        assert message in capsys.readouterr().err


def test_ids_in_and_out(native, capsys):
    assert main(["generate", "1, 15 7", "--ids", "--model", native, "--max-new-tokens", "5"]) == 0
    assert len([int(word) for word in capsys.readouterr().out.split()]) == 5


def test_an_unreadable_tokenizer_is_a_line_of_warning(native, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(native, folder)
    (folder / "tokenizer.json").write_text("{}")
    options = ("generate", "1 15 7", "--ids", "--model", folder, "--max-new-tokens", "5")
    done = subprocess.run(  # pytest keeps warnings of its own process to itself
        [sys.executable, "-m", "s3d_jax", *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 5
    warning = f"warning: cannot read the tokenizer in {folder}"
    assert [line for line in done.stderr.splitlines() if line.startswith(warning)]
    assert "warnings.warn" not in done.stderr and "return load" not in done.stderr


def test_info(native, capsys):
    assert main(["info", "--model", native]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^parameters +936,448 in float32, 3\.6 MiB$", text, re.MULTILINE)
    assert "layers [0, 1, 4] of 5" in text
    assert main(["info", "--model", native, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"]["num_layers"] == 5 and facts["tokenizer"] is True
    assert (facts["parameters"], facts["weight_bytes"]) == (936_448, 4 * 936_448)
    assert facts["eos_token_ids"] == [2]


def test_json_is_alone_on_stdout_whatever_libraries_print(native, capfd, monkeypatch):
    read = s3d_jax.storage.native.read_header

    def noisy(*args):
        print("a word from Python")
        os.write(1, b"a word from C\n")
        return read(*args)

    monkeypatch.setattr("s3d_jax.storage.native.read_header", noisy)
    generate = ["generate", "Once", "--method", "ar", "--max-new-tokens", "25", "--json"]
    for arguments in (["info", "--json"], generate):
        assert main([*arguments, "--model", native]) == 0
        out, err = capfd.readouterr()
        assert out.count("\n") == 1 and isinstance(json.loads(out), dict)
        assert "a word from Python" in err and "a word from C" in err
    assert main(["info", "--model", native]) == 0  # people may read it all
    assert capfd.readouterr().out.startswith(("a word from Python", "a word from C"))


def test_info_knows_what_windows_save(native, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(native, model)
    header = json.loads((model / "config.json").read_text())
    config = header["model"]
    sizes = {}
    for windows in (None, [None, 88, 88, 88, 88]):
        config |= {"sliding_window": windows, "max_position_embeddings": 10_000}
        (model / "config.json").write_text(json.dumps(header))
        assert main(["info", "--model", str(model), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        per_token = 2 * config["num_layers"] * config["num_kv_heads"] * config["head_dim"] * 4
        assert facts["cache_bytes_per_token"] == per_token
        sizes[windows is None] = facts["cache_bytes_of_full_row"] / (per_token / 5)
    assert sizes == {True: 5 * 10_000, False: 10_000 + 4 * (88 + 512)}
    assert main(["info", "--model", str(model)]) == 0
    assert "for a row of 10000 tokens, with windows" in capsys.readouterr().out


def test_chat_without_a_template_says_so_before_the_first_question(native, capsys):
    assert main(["chat", "--model", native]) == 2
    assert "no chat template" in capsys.readouterr().err


@pytest.fixture(scope="module")
def chatty(native, tmp_path_factory) -> str:
    """With a template that writes the messages one after another."""
    folder = tmp_path_factory.mktemp("chat") / "chatty"
    shutil.copytree(native, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }} {% endfor %}"
    )
    return str(folder)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--gamma", "0"], "gamma must be an integer >= 1"),
        (["--max-new-tokens", "0"], "max_new_tokens must be an integer >= 1"),
        (["--temperature", "-1"], "temperature"),
        (["--system", "x" * 300], "shorten it"),
    ],
)
def test_chat_refuses_wrong_options_before_the_first_question(
    chatty, options, message, capsys, monkeypatch
):
    monkeypatch.setattr("sys.stdin", None)  # nothing is read
    assert main(["chat", "--model", chatty, *options]) == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_before_an_answer_keeps_the_question(chatty, capsys, monkeypatch):
    """While a conversation is cut to the context, at the first question and at a later one."""
    encode_chat, seen = PromptEncoder.encode_chat, []

    def interrupted(encoder, messages):
        seen.append([m["content"] for m in messages])
        if len(seen) in (2, 4):  # the first one is before the first question
            raise KeyboardInterrupt
        return encode_chat(encoder, messages)

    monkeypatch.setattr(PromptEncoder, "encode_chat", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("Tom\nLily\nA cat\nA dog\n"))
    assert main(["chat", "--model", chatty, "--max-new-tokens", "5"]) == 0
    answer = capsys.readouterr().out.splitlines()[1]
    assert seen[-1] == ["Tom", "", "Lily", answer, "A cat", "", "A dog"]


def test_chat_refuses_what_is_no_text_and_continues(chatty, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nTom\n"), "utf-8"))
    assert main(["chat", "--model", chatty, "--max-new-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert err.count("error: ") == 1
    assert "message 0, 'content', is no valid text" in err and "caf\\udce9" in err
    assert len(out.splitlines()) == 1
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8"))
    assert main(["generate", "-", "--model", chatty]) == 2
    assert "prompt 0 is no valid text" in capsys.readouterr().err


def test_output_that_the_terminal_does_not_have_is_escaped(chatty, monkeypatch):
    data = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(data, "cp1252", write_through=True))
    model = ["--model", chatty, "--max-new-tokens", "1"]
    assert main(["generate", "a τ", *model]) == 0
    assert data.getvalue().startswith(b"a \\u03c4")


@pytest.mark.parametrize("program", [["s3d_jax", "bench"], ["s3d_jax", "train"], ["convert"]])
def test_help_of_a_terminal_without_greek(program):
    done = subprocess.run(
        [sys.executable, "-m", *program, "--help"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u03c4 and" in done.stdout or program[-1] != "bench"


def test_chat_remembers_the_conversation(chatty, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon a time\nThe dog\n"))
    assert main(["chat", "--model", chatty, "--max-new-tokens", "20"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert len(first) == 20 and len(second) == 20
    lm = s3d_jax.load(chatty)
    # Without special tokens of the tokenizer's own: a template writes them out.
    so_far = lm.tokenizer.encode(f"Once upon a time {first} The dog ", add_special_tokens=False)
    assert lm.generate(so_far, max_new_tokens=20)[0].text == second


def test_chat_continues_when_the_context_is_full(chatty, capsys, monkeypatch):
    questions = ("Once upon", "x" * 80, "Tom", "The dog was", "One day")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(questions)))
    options = ["--max-new-tokens", "20", "--max-length", "60"]
    assert main(["chat", "--model", chatty, *options]) == 0
    out, err = capsys.readouterr()
    answers = out.splitlines()
    assert [len(answer) for answer in answers] == [20, 20, 20, 20]
    assert err.count("error: ") == 1 and "shorten it" in err  # the long one
    lm = s3d_jax.load(chatty, max_length=60)
    # The refused question cost nothing: the first one is still known when the next is answered.
    # Before the third, the first turn is forgotten (68 tokens and 20 to come, of 60), and before
    # the fourth all of them are (41 and 20).
    first, second, third, fourth = answers
    for conversation, answer in (
        (("Once upon", first, "Tom"), second),
        (("Tom", second, "The dog was"), third),
        (("One day",), fourth),
    ):
        ids = lm.tokenizer.encode(" ".join(conversation) + " ", add_special_tokens=False)
        assert lm.generate(ids, max_new_tokens=20)[0].text == answer


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "x", "--model", "nowhere"], "by s3d-convert nowhere ..."),
        (["generate", "", "--model", "NATIVE"], "empty"),
        (["generate", "x" * 300, "--model", "NATIVE"], "larger max_length"),
        (["generate", "x", "--model", "NATIVE", "--gamma", "0"], "gamma"),
        (["generate", "x", "--model", "NATIVE", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--model", "NATIVE", "--seed", "99999999999999999999"], "seed"),
        (["generate", "-", "-", "--model", "NATIVE"], "only once"),
        (["generate", "1 two", "--ids", "--model", "NATIVE"], "numbers"),
        (["generate", "9999", "--ids", "--model", "NATIVE"], "vocabulary is 0 to 104"),
        (["info", "--model", "nowhere"], "by s3d-convert nowhere ..."),
    ],
)
def test_errors_are_one_clear_line_and_exit_code_2(native, arguments, message, capsys):
    assert main([native if a == "NATIVE" else a for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and message in err
    assert "Traceback" not in err


def test_a_hf_folder_is_told_how_to_convert(data_dir, capsys):
    source = str(data_dir / "checkpoints" / "babyllama-1m")
    assert main(["generate", "x", "--model", source]) == 2
    assert f"s3d-convert {source}" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["info"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: s3d" in text
    assert command == [] or "--model" in text
