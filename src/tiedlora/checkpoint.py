"""Checkpoints: written whole, verified when read, and enough to go on exactly.

checkpoint/step-00000050/ holds the trained parts and the optimizer's moments (tensors.safetensors) and
everything else that the loop carries (state.json, with the tensors' sha256). The order of the rows and
the dropout masks are pure functions of (seed, step), so there is no random state to keep.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from tiedlora import atomic
from tiedlora.errors import UserError
from tiedlora.loop import Progress

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
    with atomic.new_folder(folder / f"step-{progress.step:08d}") as beside:
        (beside / TENSORS).write_bytes(data)
        atomic.write_json(beside / STATE, state)
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
            state = atomic.read_json(candidate / STATE)
            if atomic.sha256(candidate / TENSORS) != state["sha256"]:
                raise ValueError("its tensors are not those it was written with")
            progress = Progress(**state["progress"])
            tensors = load_file(candidate / TENSORS)
        except (UserError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("checkpoint %s is damaged (%s); using the one before", candidate, error)
            continue
        _compare(state["facts"], facts, candidate)
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


def _compare(saved: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    for key in ("data", "base"):
        if saved.get(key) != now.get(key):
            raise UserError(
                f"{where}: was trained on another {key} ({saved.get(key)}, now {now.get(key)}); "
                "restore it, or start over with force=true"
            )
    for key in ("versions", "code", "device"):
        if saved.get(key) != now.get(key):
            log.warning("resuming with other %s: %s, now %s", key, saved.get(key), now.get(key))
