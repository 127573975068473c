"""Progress bars, shown on a terminal only."""

from typing import Any

from tqdm import tqdm


def progress_bar(what: str, total: int, shown: bool) -> Any:
    """A bar that counts bytes.

    Args:
        what: its label.
        total: bytes at the end.
        shown: False hides it on a terminal too.
    """
    return tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        disable=None if shown else True,  # None: only on a terminal
        leave=False,
    )


def notice(what: str, shown: bool) -> Any:
    """A label without a bar, for work that cannot be counted."""
    return tqdm(desc=what, bar_format="{desc} ...", disable=None if shown else True, leave=False)
