"""Hostile .bin files of torch: no code of theirs is executed, and damage is found."""

import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import need
from tests.convert.hf_folder import FIELDS, random_tensors
from tests.convert.refusal import refused

NORM = "model.norm.weight"


class Attack:
    """A call that unpickling would run."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def global_call(victim: Path) -> bytes:
    """A pickle written by hand, protocol 0: os.mkdir(victim)."""
    return b"cos\nmkdir\n(V" + str(victim).encode() + b"\ntR."


def archive(path: Path, pickled: bytes) -> None:
    """Writes a file of torch's present format around a pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickled)
        file.writestr("x/version", "3\n")
        file.writestr("x/byteorder", "little")


def bomb(path: Path) -> None:
    """Writes a megabyte that unpacks to 256."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("x/data.pkl", "w") as record,
    ):
        for _ in range(16):
            record.write(bytes(1 << 24))


def tarball(path: Path) -> None:
    """Writes the format of torch's first years."""
    with tarfile.open(path, "w") as file:
        file.add(__file__, "pickle")


def script(path: Path) -> None:
    """Writes what torch takes for a TorchScript program."""
    archive(path, b"}.")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("x/constants.pkl", b"}.")


def bin_cases() -> dict[str, tuple[Callable[[Any, dict, Path, Path], Any], str]]:
    """(torch, state, file, victim) -> the damage; and the message."""

    def saved(change: Callable[[Any, dict], Any], **options: Any) -> Callable:
        return lambda t, state, file, victim: t.save(change(t, state), file, **options)

    def flipped(where: Callable[[bytes], int]) -> Callable:
        def damage(t: Any, state: dict, file: Path, victim: Path) -> None:
            data = bytearray(file.read_bytes())
            data[where(bytes(data))] ^= 1
            file.write_bytes(data)

        return damage

    def shortened(keep: float) -> Callable:
        def damage(t: Any, state: dict, file: Path, victim: Path) -> None:
            data = file.read_bytes()
            file.write_bytes(data[: int(keep * len(data))])

        return damage

    code = "could execute code"
    plain = "must hold a dict of tensors"
    old = dict(_use_new_zipfile_serialization=False)
    return {
        "code, saved by torch": (
            lambda t, state, file, victim: t.save({**state, "x": Attack(victim)}, file), code,
        ),
        "code, in the old format": (
            lambda t, state, file, victim: t.save({**state, "x": Attack(victim)}, file, **old),
            code,
        ),
        "code, a bare pickle": (
            lambda t, state, file, victim: file.write_bytes(pickle.dumps(Attack(victim))), code,
        ),
        "code, by hand": (
            lambda t, state, file, victim: file.write_bytes(global_call(victim)), code,
        ),
        "code, by hand in an archive": (
            lambda t, state, file, victim: archive(file, global_call(victim)), code,
        ),
        "code, as a name": (
            lambda t, state, file, victim: archive(
                file, b"}" + global_call(victim)[:-1] + b"K\x01s."
            ),
            code,
        ),
        "text": (lambda t, state, file, victim: file.write_text("hello"), "pytorch_model.bin"),
        "empty": (lambda t, state, file, victim: file.write_bytes(b""), "pytorch_model.bin"),
        "an empty archive": (
            lambda t, state, file, victim: zipfile.ZipFile(file, "w").close(), "pytorch_model.bin",
        ),
        "a bomb": (lambda t, state, file, victim: bomb(file), "it is compressed"),
        "a tarball": (lambda t, state, file, victim: tarball(file), code),
        "a program": (lambda t, state, file, victim: script(file), code),
        "half": (shortened(0.5), "pytorch_model.bin"),
        "without its end": (shortened(0.99), "pytorch_model.bin"),
        "a bit of the weights flipped": (
            flipped(lambda data: data.index(b"/data/5") + 200), "pytorch_model.bin is damaged",
        ),
        "a bit of the directory flipped": (
            flipped(lambda data: data.rindex(b"PK\x01\x02") + 2), "pytorch_model.bin",
        ),
        "a list": (saved(lambda t, state: [t.zeros(2)]), plain),
        "a tensor": (saved(lambda t, state: t.zeros(2)), plain),
        "a training state": (saved(lambda t, state: {"model": state, "epoch": 3}), plain),
        "names that are numbers": (saved(lambda t, state: dict(enumerate(state.values()))), plain),
        "sparse": (
            saved(lambda t, state: {**state, NORM: state[NORM].to_sparse()}), "is no plain tensor",
        ),
        "without data": (
            saved(lambda t, state: {**state, NORM: t.empty(24, device="meta")}),
            "is no plain tensor",
        ),
        "complex": (
            saved(lambda t, state: {**state, NORM: state[NORM].to(t.complex64)}),
            "stored as complex64",
        ),
        "integers": (
            saved(lambda t, state: {**state, NORM: state[NORM].to(t.int64)}), "stored as int64",
        ),
        "endless by strides": (
            saved(lambda t, state: {**state, NORM: t.zeros(1).expand(2**40)}),
            "shape [1099511627776]",
        ),
        "missing": (
            saved(lambda t, state: {k: v for k, v in state.items() if k != NORM}),
            f"{NORM}: missing",
        ),
        "extra": (saved(lambda t, state: {**state, "x": t.zeros(3)}), "x: unknown"),
        "NaN": (
            saved(lambda t, state: {**state, NORM: state[NORM] * float("nan")}),
            "holds infinities or NaN",
        ),
    }  # fmt: skip


BINS = bin_cases()


@pytest.mark.parametrize("case", BINS)
def test_hostile_torch_files(tmp_path, case):
    torch = need("torch")
    folder, victim = tmp_path / "hf", tmp_path / "executed"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FIELDS))
    state = {name: torch.tensor(x) for name, x in random_tensors().items()}
    torch.save(state, folder / "pytorch_model.bin")
    damage, message = BINS[case]
    damage(torch, state, folder / "pytorch_model.bin", victim)
    refused(folder, tmp_path, message)
    assert not victim.exists()


def test_the_attacks_work_on_those_who_unpickle(tmp_path):
    for name, attack in (("a", global_call), ("b", lambda victim: pickle.dumps(Attack(victim)))):
        pickle.loads(attack(tmp_path / name))
        assert (tmp_path / name).exists()
