"""Checkpoints: written whole, verified when read, and enough to go on exactly.

checkpoint/step-00000050/ holds the trained parts and the optimizer's moments (tensors.safetensors) and
everything else that the loop carries (state.json, with the tensors' sha256 and its own). The order of the rows and
the dropout masks are pure functions of (seed, step), so there is no random state to keep.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from tiedlora import storage
from tiedlora.errors import UserError
from tiedlora.training.loop import Progress

log = logging.getLogger(__name__)

KEEP = 2
"""Newest checkpoints kept: if the last one is damaged, the one before is used."""
TENSORS, STATE = "tensors.safetensors", "state.json"


def save(
    folder: Path,
    progress: Progress,
    parts: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
) -> None:
    """Write a checkpoint of this step, then drop the oldest ones.

    Args:
        parts: the trained parts, by name.
        facts: what the run depends on (data and base digests, versions), compared at resume.

    Raises:
        OSError: it could not be written; earlier checkpoints are untouched.
    """
    tensors = {f"part/{name}": parameter.detach().cpu().contiguous() for name, parameter in parts.items()}
    for name, parameter in parts.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{key}"] = value.detach().cpu().contiguous()
    data = to_bytes(tensors)
    state = {"progress": asdict(progress), "facts": facts, "sha256": hashlib.sha256(data).hexdigest()}
    state["state_sha256"] = _digest(state)
    with storage.new_folder(folder / f"step-{progress.step:08d}") as beside:
        (beside / TENSORS).write_bytes(data)
        storage.write_json(beside / STATE, state)
    for old in _newest_first(folder)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)


def restore(
    folder: Path, parts: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, facts: dict[str, Any]
) -> Progress | None:
    """Load the newest sound checkpoint into `parts` and `optimizer`; None if there is none.

    A damaged one is named and passed over. Other package versions or another commit are said in a
    warning; other data or another base model is an error.

    Raises:
        UserError: the data or the base model is not what the checkpoint was trained on.
    """
    for candidate in _newest_first(folder):
        try:
            state = storage.read_json(candidate / STATE)
            if storage.sha256(candidate / TENSORS) != state["sha256"]:
                raise ValueError("its tensors are not those it was written with")
            # A checkpoint from before version 1.1 has no digest of its state.
            if state.pop("state_sha256", None) not in (None, _digest(state)):
                raise ValueError("its state is not the one it was written with")
            progress, saved = Progress(**state["progress"]), dict(state["facts"])
            tensors = load_file(candidate / TENSORS)
            if wrong := [n for n, part in parts.items() if tensors[f"part/{n}"].shape != part.shape]:
                raise ValueError(f"{wrong[0]} has another shape than in this run")
        except (UserError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("checkpoint %s is damaged (%s); using the one before", candidate, error)
            continue
        _compare(saved, facts, candidate)
        with torch.no_grad():
            for name, parameter in parts.items():
                parameter.copy_(tensors[f"part/{name}"])
                prefix = f"optimizer/{name}/"
                optimizer.state[parameter] = {
                    # AdamW keeps its step count on the CPU, its moments beside the parameter.
                    key.removeprefix(prefix): value if value.ndim == 0 else value.to(parameter.device)
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
        return progress
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*[0-9]"), reverse=True)


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _compare(saved: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    for key in ("data", "base"):
        if saved.get(key) != now.get(key):
            raise UserError(
                f"{where}: was trained on another {key} ({saved.get(key)}, now {now.get(key)}); "
                "restore it, or start over with force=true"
            )
    for key in ("versions", "code", "device"):
        before, after = saved.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
            before, after = ({name: facts.get(name) for name in changed} for facts in (before, after))
        if before != after:
            log.warning("resuming with other %s: %s, now %s", key, before, after)
