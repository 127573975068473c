"""How a broken or hostile source must be refused."""

import re
import time
from pathlib import Path

import pytest

import convert
from s3d_jax.errors import S3DError

# Every message must give advice in one of these ways.
ADVICE = re.compile(
    r"get |set it|set the|save |correct|remove|choose|convert |free some|give |use |must be|"
    r"supported|known are|expected|needs|is it a|only split|no multiple"
)


def refused(source: Path, tmp_path: Path, *words: str) -> str:
    """Converts; the refusal must contain the words, say what to do, and take little CPU time."""
    start = time.process_time()
    with pytest.raises(S3DError) as caught:
        convert.convert(source, tmp_path / "out", parity=False, progress=False)
    assert time.process_time() - start < 5
    assert not list(tmp_path.glob("out*"))
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert ADVICE.search(message), message
    assert len(message) < 10_000 and "\x1b" not in message
    return message
