"""The documentation: links lead somewhere, the README runs as it stands, the API page is full."""

import inspect
import re
import tomllib
from pathlib import Path

import convert
import s3d_jax
from s3d_jax.engine.costs import Experiences

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    page
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "recipes/**/*.md",
        "drafts/**/*.md",
        "s3d_jax/assets/**/*.md",
    )
    for page in ROOT.glob(pattern)
)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Those that GitHub makes of the headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if link.startswith(("http://", "https://")):
                continue
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert len(PAGES) > 15 and broken == []


def test_pages_that_the_code_names_exist():
    sources = [
        path
        for folder in ("s3d_jax", "convert", "benchmarks", "recipes", "tests")
        for pattern in ("**/*.py", "**/*.sh")
        for path in (ROOT / folder).glob(pattern)
    ]
    named = {
        (path.name, name)
        for path in sources
        for name in re.findall(r"\bdocs/[\w/.-]+\.md", path.read_text(encoding="utf-8"))
    }
    assert named and [(by, name) for by, name in named if not (ROOT / name).exists()] == []


def test_the_readme_is_short_and_what_it_shows_is_what_comes_out(capsys):
    """Its Python runs as it stands, and its command prints that text; the times are one machine's.

    (One test, so that both use the same compiled programs.)
    """
    assert len(README.splitlines()) <= 90
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(code.split("\n\n")[1].splitlines()) < 10
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "Lily" in capsys.readouterr().out

    command, text, tau = re.search(
        r"^\$ s3d (.+)\n((?:.+\n)+?)\[s3d: .* ([\d.]+) per iteration", README, re.MULTILINE
    ).groups()
    prompt, new = re.fullmatch(r'generate "(.+)" --max-new-tokens (\d+)', command).groups()
    names["lm"].experiences = Experiences()  # the command knows no earlier texts
    (result,) = names["lm"].generate(prompt, max_new_tokens=int(new))
    assert " ".join(text.split()) == " ".join((prompt + result.text).split())
    assert f"{result.stats.tokens_per_iteration:.2f}" == tau


def test_the_api_page_names_every_public_name_with_its_parameters():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for package in (s3d_jax, convert):
        for name in package.__all__:
            shown = re.search(rf"`{package.__name__}\.{name}(?:\((.*?)\))?(?: ->.*?)?`", page)
            assert shown, name
            if shown[1] and "…" not in shown[1]:
                parameters = re.findall(r"(?:^|, )(\w+)", shown[1])
                assert parameters == [*inspect.signature(getattr(package, name)).parameters], name


def test_the_pictures_of_the_floors_are_the_contract():
    """In CONTRIBUTING and in docs/architecture.md, where words stand next to the names."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    floors = [
        {room.strip().removeprefix("s3d_jax.") for room in re.split("[:|]", layer)}
        for layer in contract["layers"]
    ]
    for name in ("CONTRIBUTING.md", "docs/architecture.md"):
        blocks = re.findall(
            r"^```\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        )
        (picture,) = [block for block in blocks if block.lstrip().startswith("commands")]
        assert [set(line[:56].split()) for line in picture.splitlines()] == floors, name


def test_the_architecture_page_names_every_room_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page[page.index("| room | holds |") :].partition("\n\n")[0]
    named = {
        name.rstrip("/")
        for row in table.splitlines()[2:]
        for name in re.findall(r"`([^`]+)`", row.split("|")[1])
    }
    package = ROOT / "s3d_jax"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    rooms |= {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    assert named == rooms | {"convert"}


def test_files_that_the_pages_name_exist():
    places = [ROOT, ROOT / "s3d_jax", ROOT / "convert"]
    missing = [
        (page.name, name)
        for page in PAGES
        if page.parent.name != "log"  # it tells what was, too
        for name in re.findall(r"`([\w/]+\.(?:py|sh|ipynb))`", page.read_text(encoding="utf-8"))
        if not any((place / name).exists() for place in [*places, page.parent])
    ]
    assert missing == []
