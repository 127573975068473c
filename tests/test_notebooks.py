"""The notebooks run from top to bottom, on the small model."""

import json
from pathlib import Path

import pytest

from tests.sampled import sampled

SOURCE = "github.com/OWNER/s3d_jax"  # OWNER is whoever publishes it
NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", sampled({p.stem: p for p in NOTEBOOKS}, ["generate"]))
def test_notebook_runs(path, data_dir, monkeypatch, capsys):
    monkeypatch.setenv("S3D_MODEL", str(data_dir / "checkpoints" / "babyllama-1m"))
    small = {"TEXTS": 64, "LENGTH": 48, "STEPS": 40, "DRAFT": "", "QUESTION": "Once upon a time",
             "LAYERS": 2, "GAMMAS": "1 3"}  # fmt: skip
    for name, value in small.items():
        monkeypatch.setenv(f"S3D_{name}", str(value))
    cells = json.loads(path.read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells)  # committed without outputs
    names: dict = {}
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            lines = (line for line in cell["source"] if not line.startswith("%"))  # Jupyter's own
            exec(compile("".join(lines), f"{path.name}[{i}]", "exec"), names)
    assert "there was a little girl" in capsys.readouterr().out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_opens_in_colab_and_leaves_its_jax_alone(path):
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
    page = SOURCE.replace("github.com", "https://colab.research.google.com/github")
    assert f"({page}/blob/main/notebooks/{path.name})" in cells[0]
    (install,) = (cell for cell in cells if "%pip" in cell)
    assert f"https://{SOURCE}" in install
    assert "cuda" not in install and "--upgrade" not in install
