"""The command s3d-convert: what it prints, and what an interruption leaves behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import s3d_jax
from convert.__main__ import main
from convert.sources.base import read_hf_json
from s3d_jax.storage import native as checkpoint
from tests.conftest import need
from tests.convert.hf_folder import write_folder, write_large_folder
from tests.sampled import sampled

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(
    "command, words",
    [
        ([], ["OUT_DIR", "--overwrite", "--dry-run"]),
        (["export"], ["NATIVE_DIR", "OUT_DIR", "--overwrite"]),
        (["inspect"], ["HF_DIR_OR_ID", "--json", "Exit code"]),
        (["verify"], ["NATIVE_DIR", "HF_DIR_OR_ID", "--json", "--max-kl", "Exit code"]),
    ],
)
def test_help(command, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: s3d-convert" in text and "examples:" in text
    assert not [word for word in words if word not in text]


def test_there_and_back(tmp_path, data_dir, capsys):
    need("torch")
    source, native = str(data_dir / "checkpoints" / "babyllama-1m"), str(tmp_path / "native")
    assert main([source, native]) == 0
    out, err = capsys.readouterr()
    assert "936,448 parameters in float32, 3.6 MiB" in out and "the cast" not in out
    assert "same greedy token at 100.0% of the positions" in out
    assert f"--model {native}" in out
    assert err == ""
    assert main(["export", native, str(tmp_path / "hf")]) == 0
    assert "AutoModelForCausalLM" in capsys.readouterr().out
    again = str(tmp_path / "again")
    assert main([str(tmp_path / "hf"), again, "--no-parity", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    headers = [checkpoint.read_header(path) for path in (native, again)]
    assert headers[0].arrays == headers[1].arrays


def test_parity_after_a_cast_comes_with_hf_s_own_rounding(tmp_path, data_dir, capsys):
    need("torch")
    source = data_dir / "checkpoints" / "babyllama-1m"
    assert main([str(source), str(tmp_path / "native"), "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "in float32, ours in bfloat16, 640 tokens of text: largest difference of a logit" in out
    (line,) = (line for line in out.splitlines() if "rounding" in line)
    assert "HF's own rounding to bfloat16: largest difference of a logit" in line
    assert "--dtype float32 rounds nothing" in line


def test_json_is_alone_on_stdout_whatever_libraries_print(tmp_path, capsys, monkeypatch):
    def noisy(path):
        print("a word from a library")
        return read_hf_json(path)

    monkeypatch.setattr("convert.sources.open.read_hf_json", noisy)
    assert main(["inspect", str(write_folder(tmp_path / "hf")), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["num_faults"] == 0 and err == "a word from a library\n"


def test_overwrite_says_what_it_removes(capsys):
    for command in ([], ["export"]):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "all that OUT_DIR holds is removed, files that you put there too" in text


def test_dtype_and_a_missing_tokenizer(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf")
    arguments = [str(folder), str(tmp_path / "out"), "--no-parity", "--dtype", "bfloat16"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "in bfloat16" in out and "no tokenizer" in out and "not asked for" in out
    assert f"s3d info --model {tmp_path / 'out'}" in out  # a text would be refused
    assert s3d_jax.load(tmp_path / "out").params["embed"]["embedding"].dtype == "bfloat16"


def test_errors_go_to_stderr_with_exit_code_2(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    written = write_folder(tmp_path / "written")
    cases = [
        ([str(tmp_path / "nowhere"), str(tmp_path / "out")], "there is no such folder"),
        ([str(folder), str(tmp_path / "full")], "choose another folder"),
        ([str(folder), str(written)], "--overwrite"),
        (["export", str(folder), str(tmp_path / "out")], "is a HF checkpoint"),
        (["export", "nowhere", str(tmp_path / "out")], "no such folder"),
        (["export", "x", "y", "--max-shard-size", "5 apples"], "'5 apples' is no size"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and message in err


# --- interruption ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """340 MB: half a second of writing."""
    folder = tmp_path_factory.mktemp("large") / "hf"
    write_large_folder(folder, num_layers=4, shards=2)
    yield folder
    remove_files(folder)


def start(source: Path, out: Path) -> subprocess.Popen:
    """Starts a conversion and waits until it is writing."""
    command = [sys.executable, "-m", "convert", source, out, "--no-parity"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts its background jobs with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(out.parent.glob("out.partial-*/weights")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    return process


def test_ctrl_c_leaves_nothing_behind(large, tmp_path):
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        process = start(large, folder / "out")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        if process.returncode == 0:  # on a busy machine the signal may come too late
            checkpoint.load(folder / "out")
            remove_files(folder)
            continue
        assert process.returncode == 130
        assert "interrupted; nothing was written" in err and "Traceback" not in err
        assert not list(folder.iterdir())
        return
    pytest.fail("five interrupted conversions ran to the end")


def test_a_kill_never_leaves_what_looks_complete(large, tmp_path):
    rng = random.Random(0)
    out = tmp_path / "out"
    for _ in range(5):
        process = start(large, out)
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        process.communicate(timeout=60)
        if out.exists():  # it was faster than the kill, so it must be whole
            checkpoint.load(out)
            out.rename(tmp_path / f"done-{len(os.listdir(tmp_path))}")
        for partial in tmp_path.glob("out.partial-*"):
            assert not (partial / "config.json").exists() or (partial / "weights.json").exists()
    assert list(tmp_path.glob("out.partial-*"))  # at least one was caught in the middle
    assert main([str(large), str(out), "--no-parity", "--quiet"]) == 0
    checkpoint.load(out)
    remove_files(tmp_path)


# --- memory ---------------------------------------------------------------------------------------

# The peak of this program alone: getrusage would include what its parent held at its start.
MEASURE = """
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
before = peak()
import json, sys
import convert
convert.convert(sys.argv[1], sys.argv[2], parity=False, progress=False)
print(json.dumps([before, peak()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "num_layers, gigabytes, most", sampled([(9, 0.6, 0.45), (38, 2.1, 0.8)], [(9, 0.6, 0.45)])
)
def test_a_conversion_needs_less_memory_than_the_weights(tmp_path, num_layers, gigabytes, most):
    size = write_large_folder(tmp_path / "hf", num_layers, shards=4)
    assert size / 1e9 == pytest.approx(gigabytes, rel=0.05)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "hf", tmp_path / "out"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert done.returncode == 0, done.stderr
        before, peak = json.loads(done.stdout)
        print(f"{size / 1e9:.2f} GB: {(peak - before) / 1e6:.0f} MB above {before / 1e6:.0f} MB")
        assert before < 0.03e9  # the interpreter's own; jax and orbax count as ours
        assert 0.05 < (peak - before) / 1e9 < most
        assert checkpoint.read_header(tmp_path / "out").config.num_layers == num_layers
    finally:
        remove_files(tmp_path)


def remove_files(folder: Path) -> None:
    """Removes files that are too large for pytest to keep, as it does for its last runs."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.unlink()
