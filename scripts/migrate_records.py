"""python scripts/migrate_records.py studies/NAME [...]: move a study's records to the names of arms of December 2026.

Folders and ids of runs begin with the arm's name, which follows from the values of the run: what was TABuv is TABuv_b0,
TABuv_v0 is TABuv, and LoRA on some layers is no `custom`. The hash of an id stays. result.json gets the arm, and
selection.json the new ids. Every other file stays as it is, and its sha256 is compared. A second call changes nothing.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

from tiedlora import errors, storage
from tiedlora.config.compose import read_config
from tiedlora.config.identity import arm_of, run_id
from tiedlora.config.trial_arm import TrialArm
from tiedlora.records.run_record import read_record
from tiedlora.records.selection import read_selection

CHANGED = ("config.yaml", "result.json", "selection.json")
NAME = re.compile(r"(^tying:\n(?:  .*\n)*?  name: )(.+)$", re.MULTILINE)
"""tying.name in a config.yaml."""


def main(study: Path) -> None:
    before = digests(study)
    folders = sorted(path.parent for path in study.glob("*/*/config.yaml"))
    moved: dict[str, tuple[str, TrialArm]] = {}
    for folder in folders:
        config = read_config(folder / "config.yaml")
        new, arm = run_id(config), arm_of(config)
        assert new.rpartition("-")[2] == folder.name.rpartition("-")[2], f"{folder}: {new} has another hash"
        moved[folder.name] = new, arm
        migrate_run(folder, new, arm)
    for path in study.glob("*/sweeps/*/selection.json"):
        migrate_selection(path, moved)
    for folder in folders:
        if (new := moved[folder.name][0]) != folder.name:
            folder.rename(folder.with_name(new))
    compare(study, before, {old: new for old, (new, _) in moved.items()})


def migrate_run(folder: Path, new: str, arm: TrialArm) -> None:
    """Write the new id, the arm, and the name of a known arm into a run's files."""
    text = storage.read_bytes(folder / "config.yaml").decode()
    named = NAME.sub(rf"\g<1>{arm.option}", text, count=1)
    if named != text:
        storage.write_bytes(folder / "config.yaml", named.encode(), flush=False)
    path = folder / "result.json"
    if path.exists():
        tree = storage.read_json(path)
        tree["run_id"], tree["config"]["tying"]["name"] = new, arm.option
        storage.write_bytes(path, storage.json_bytes(tree), flush=False)
        record = read_record(path)
        assert record.arm == arm, f"{path}: the record and config.yaml have two arms"
        storage.write_bytes(path, storage.json_bytes({**tree, "arm": record.to_json()["arm"]}), flush=False)


def migrate_selection(path: Path, moved: dict[str, tuple[str, TrialArm]]) -> None:
    """Write the new ids and names of arms into a selection.json."""
    tree: dict[str, Any] = storage.read_json(path)
    labels: dict[str, str] = {}
    for choice in tree["choices"]:
        arms = {moved[old][1] for old in choice["run_ids"] if old in moved}
        (arm,) = arms
        # An earlier version left the purpose of an arm out of the group.
        old_name, new_name = choice["configuration"].partition(" (")[0], arm.label.partition(" (")[0]
        for old, new in ((choice["configuration"], arm.label), (old_name, new_name)):
            end = f" r={choice['rank']} on {choice['task']}, "
            labels[old + end] = new + end
        choice["run_ids"] = [moved[old][0] for old in choice["run_ids"]]
        choice["configuration"] = arm.label
    for search in tree.get("searches", ()):
        for old, new in labels.items():
            if search["group"].startswith(old):
                search["group"] = new + search["group"].removeprefix(old)
                break
        else:
            assert search["group"].startswith("LoRA"), f"{path}: {search['group']} has no choice"
    storage.write_bytes(path, storage.json_bytes(tree), flush=False)
    read_selection(path)


def digests(study: Path) -> dict[Path, str]:
    """Path inside the study -> sha256, for the files that must not change."""
    files = [path for path in study.rglob("*") if path.is_file() and path.name not in CHANGED]
    return {path.relative_to(study): storage.sha256(path) for path in files}


def compare(study: Path, before: dict[Path, str], new_names: dict[str, str]) -> None:
    """Check that every file of `before` is there with the same sha256, and no other, and print what was compared."""
    expected = {Path(*(new_names.get(part, part) for part in path.parts)): own for path, own in before.items()}
    after = digests(study)
    assert after == expected, sorted(map(str, set(after.items()) ^ set(expected.items())))[:5]
    moved = sum(old != new for old, new in new_names.items())
    print(f"{study}: {len(new_names)} runs, {moved} moved")
    for what in ("predictions", "adapter", "metrics.jsonl", "base"):
        own = sorted(digest for path, digest in after.items() if what in path.parts)
        then = sorted(digest for path, digest in before.items() if what in path.parts)
        one, other = (hashlib.sha256("\n".join(each).encode()).hexdigest()[:16] for each in (then, own))
        print(f"  {what:<14} {len(then)} files before, {len(own)} after; sha256 of all their sha256: {one}, {other}")
    print(f"  all {len(after)} files that have no name in them are as they were")


if __name__ == "__main__":
    with errors.exit_codes():
        for argument in sys.argv[1:]:
            main(Path(argument))
