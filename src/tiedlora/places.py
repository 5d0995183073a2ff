"""Where the options are, and where results and the cache go if nobody says otherwise.

In a checkout, options are at its top, and outputs/ and .cache/ stand beside them. An installed package has the options
in itself (pyproject.toml puts them there). It writes to outputs/ of the working folder, because nobody looks for
results among packages, and it keeps its cache where the system keeps those of a user.
"""

import os
from pathlib import Path

import platformdirs

_PACKAGE = Path(__file__).resolve().parent
PROJECT = None if (_PACKAGE / "conf").is_dir() else _PACKAGE.parents[1]
"""The folder of the checkout whose code this is; None in an installed package."""
DATA = PROJECT or _PACKAGE
"""The folder of conf/, sweeps/ and claims/."""
CONF = DATA / "conf"
CLAIMS = DATA / "claims" / "tied_lora.yaml"
"""The claims that a report and a deciding sweep ask if they are given no others."""


def folder_of(variable: str) -> str | None:
    """The folder that a variable of the environment names, with ~ as the home folder; None if it names none."""
    return os.path.expanduser(os.environ.get(variable, "")) or None


def default_folder(kind: str) -> Path:
    """The folder of `outputs` or of the `cache` without a variable of the environment."""
    if kind == "outputs":
        return (PROJECT or Path.cwd()) / "outputs"
    return PROJECT / ".cache" if PROJECT else Path(platformdirs.user_cache_dir("tiedlora"))


def outputs_folder() -> Path:
    """The folder of runs, for commands that read no configuration."""
    return Path(folder_of("TIEDLORA_OUTPUTS") or default_folder("outputs"))


def cache_folder() -> Path:
    """The folder of converted models and unpacked records, for commands that read no configuration."""
    return Path(folder_of("TIEDLORA_CACHE") or default_folder("cache"))


def own_options() -> Path | None:
    """conf/ of the working folder, for options of one's own; None without one, or if it is the project's."""
    folder = Path("conf")
    return folder.absolute() if folder.is_dir() and folder.resolve() != CONF else None
