"""The folder of the checkout. It contains train.py, conf/ and, by default, outputs/ and .cache/."""

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
CONF = PROJECT / "conf"


def folder_of(variable: str) -> str | None:
    """The folder that a variable of the environment names, with ~ as the home folder; None if it names none."""
    return os.path.expanduser(os.environ.get(variable, "")) or None
