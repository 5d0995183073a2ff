"""Code that the tests of malformed input share. A refusal is one UserError, and changes no file."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from tiedlora.errors import UserError

HOSTILE = (
    "</pre><script>alert(1)</script>\x1b[2J\x1b]0;owned\x07\x00\u202e\x9b31m\u2028 =1+1 "
    "\\input{/etc/passwd} [x](javascript:1)"
)
"""Texts that a model or a stranger's record may contain: script, terminal escapes, a formula, LaTeX, a link."""
EXAMPLES = os.environ.get("HOSTILE_EXAMPLES")
"""How many examples to search. If it is set, every search draws other examples."""


def search(examples: int) -> settings:
    """The tests always use the same examples, except if HOSTILE_EXAMPLES is set."""
    return settings(
        max_examples=int(EXAMPLES or examples),
        derandomize=EXAMPLES is None,
        deadline=None,
        database=None,
        # The phase "explain" traces every line, which takes minutes here.
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


ODD_TEXTS = st.one_of(
    st.text(st.characters(), max_size=20),
    st.sampled_from(["\x00", "\x1b[2J", "\ud800", "\u202e", "../../etc/passwd", "<script>", "=1+1", "???", "${seed}"]),
    st.sampled_from(["${oc.env:HOME}", "${", "a" * 5000, "$\\frac{", "NaN", "null", "-1", "1e999", "~nobody/x", ""]),
)
ODD_NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 10**12, 10**400, 2**63, 1e308, float("inf"), float("nan"), True, False]),
)
ODD_VALUES = st.recursive(
    st.none() | ODD_TEXTS | ODD_NUMBERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD_TEXTS, inner, max_size=3),
    max_leaves=6,
)
"""All values of JSON and more: not-a-numbers, and texts that end lines, paths and pages."""


def snapshot(folder: Path) -> dict[str, object]:
    """The content of a folder. Links are not followed."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == ".lock":
            continue
        if path.is_symlink():
            found[name] = path.readlink()
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = path.is_dir()
    return found


@contextmanager
def refused(says: str, folder: Path | None = None) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """The block must raise a UserError with `says` in its message, and must not change `folder`."""
    before = snapshot(folder) if folder else None
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        yield caught
    assert caught.value.args[0].strip()
    assert before is None or snapshot(folder) == before


def right_or_refused() -> suppress:
    """The block must succeed or raise a UserError, and no other exception."""
    return suppress(UserError)


def change_rows(path: Path, change: Callable[[dict], object], numbers: Sequence[int] | None = None) -> None:
    """Change rows of a file of scores in place: all, or those with these numbers (from 0). Their sha256 stays right."""
    # A text may hold other ends of lines.
    head, *rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    for number in range(len(rows)) if numbers is None else numbers:
        change(rows[number])
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    head["rows_sha256"] = hashlib.sha256(lines.encode()).hexdigest()
    path.write_text(json.dumps(head) + "\n" + lines)


def change_lines(path: Path, change: Callable[[dict], object], numbers: Sequence[int] | None = None) -> None:
    """Change the JSON objects of a file in place: all lines, or those with these numbers (from 0)."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number in range(len(rows)) if numbers is None else numbers:
        change(rows[number])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def put(folder: Path, key: str, value: object) -> None:
    """Set a dotted key of result.json, or remove it if the value is `...`."""
    path = folder / "result.json"
    path.write_text(json.dumps(_with_key(json.loads(path.read_text()), key, value)))


def put_in_scores(path: Path, key: str, value: object) -> None:
    """As `put`, a key of the first line of a file of scores."""
    head, rows = path.read_text().split("\n", 1)
    path.write_text(f"{json.dumps(_with_key(json.loads(head), key, value))}\n{rows}")


def _with_key(tree: dict, key: str, value: object) -> dict:
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        node = node[name]
    node[last] = value
    if value is ...:
        del node[last]
    return tree
