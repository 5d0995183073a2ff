"""What a sweep's files say in words: the sweeper's decisions, the verdicts, why a cell failed.

The texts of strangers are made short, and their control characters visible.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from tiedlora import storage
from tiedlora.errors import UserError
from tiedlora.records.selection import Selection
from tiedlora.text import visible

LONGEST_REASON = 300
"""Most characters of an error or a reason that are shown."""
LONGEST_TAIL = 2**16
"""Most bytes of error.txt that are read, from its end."""
VERDICTS_FILE = "verdicts.json"
"""What a deciding sweep writes at its end (deciding.py)."""


def last_line(path: Path) -> str:
    """The last line of a text file for people. A file of any size is read only at its end."""
    try:
        if path.is_symlink() or not path.is_file():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LONGEST_TAIL))
            lines = file.read(LONGEST_TAIL).decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return short(lines[-1].removeprefix("tiedlora.errors.")) if lines else "no message"


def short(text: str) -> str:
    """A text of a stranger on one line, without control characters."""
    return visible(text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} ...")


def decided(selection: Selection | None) -> list[str]:
    """What the sweeper has decided and why, in the order of its searches; or the rates that `select` has chosen."""
    if selection is None:
        return []
    lines = []
    for search in selection.searches:
        for made in search.decisions:
            seed = "" if made.seed is None else f", seed {made.seed}"
            step = "" if made.step is None else f", step {made.step}"
            lines.append(f"{short(search.group)}: {made.lr:g} {short(made.action)}{seed}{step}: {short(made.reason)}")
    if not selection.searches:
        lines += [
            f"{short(choice.configuration)} r={choice.rank} on {short(choice.task)}, {short(choice.model)}: "
            f"{choice.lr:g} chosen: {short(choice.metric)} {choice.value:.3f}, the best of {len(choice.lrs)} rates"
            for choice in selection.choices
        ]
    return lines


def verdicts(sweep_folder: Path) -> list[str]:
    """The verdicts of a deciding sweep; none before its end, or if the file is damaged."""
    try:
        entries = json.loads(storage.read_bytes(sweep_folder / VERDICTS_FILE))
    except (UserError, ValueError, RecursionError):
        return []
    claims = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return [
        short(f"{claim.get('claim')} ({claim.get('model')}, {claim.get('task')}): {claim.get('verdict')}")
        + short(f": {claim.get('reason')}")
        for claim in claims
    ]
