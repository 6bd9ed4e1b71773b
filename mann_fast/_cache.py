"""Where files are kept between runs: fetched data, tuned launch configurations."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """MANN_FAST_CACHE, else XDG_CACHE_HOME/mann_fast, else ~/.cache/mann_fast."""
    if named := os.environ.get("MANN_FAST_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mann_fast"
