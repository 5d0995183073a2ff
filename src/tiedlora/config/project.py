"""The folder of the checkout. It contains train.py, conf/ and, by default, outputs/ and .cache/."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tiedlora.errors import UserError
from tiedlora.storage import conf_folder

PROJECT = Path(__file__).resolve().parents[3]
CONF = conf_folder()
T = TypeVar("T")


def folder_of(variable: str) -> str | None:
    """The folder that a variable of the environment names, with ~ as the home folder; None if it names none."""
    return os.path.expanduser(os.environ.get(variable, "")) or None


def filled(option: str, kind: Callable[[str], T]) -> Callable[[str], T]:
    """The `type=` of a path for argparse. An empty one would be the present folder, or count as not given.

    Args:
        option: as the message names it, such as `--out`.
        kind: what the command gets: str or Path.
    """

    def path(text: str) -> T:
        if not text:
            raise UserError(f"{option}: is empty; give a path, or leave it out (is a variable of the shell not set?)")
        return kind(text)

    return path
