"""Checkpoints. They are written completely or not at all, verified when they are read, and allow an exact resume.

checkpoint/step-00000050/ holds the trained parts, the buffers that training changed and the optimizer's moments
(tensors.safetensors). state.json has the rest of the loop's state, the facts that a resumed run compares (code,
versions, data, base model, execution), and the sha256 of the tensors and of itself.
checkpoint/best-... beside it has the parts of the best validation, for score.checkpoint=best. The order of the rows and
the dropout masks are pure functions of (seed, step), so a checkpoint needs no random state.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tiedlora import storage
from tiedlora.adapter.files import write_tensors
from tiedlora.errors import UserError
from tiedlora.reading import StoredText, plain, typed
from tiedlora.records.provenance import CHAT_TEMPLATE, TOKEN_FILES, CodeVersion, ContinuedFrom, Execution
from tiedlora.training.loop import TrainState

log = logging.getLogger(__name__)

KEEP = 2
"""How many of the newest checkpoints are kept. If the last one is damaged, the one before it is used."""
TENSORS, STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class RunInputs:
    """What a run depends on. It is compared when the run continues from a checkpoint."""

    execution: Execution
    data: dict[str, str] = field(default_factory=dict)
    """Split -> the digest of its rows."""
    base: StoredText = ""
    """The digest of the base model."""
    versions: dict[str, str] = field(default_factory=dict)
    code: CodeVersion | None = None


def save(
    folder: Path,
    state: TrainState,
    parts: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    inputs: RunInputs,
    *,
    buffers: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write a checkpoint of this step, and then remove all but the newest ones.

    Args:
        folder: the folder of all checkpoints of the run.
        parts: the trained parts, by name.
        buffers: the arm's other tensors that have changed, by name.

    Raises:
        OSError: it could not be written; earlier checkpoints are unchanged.
        SafetensorError: the same, in the library that writes the tensors.
    """
    tensors = _of_arm(parts, buffers)
    for name, parameter in parts.items():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    here = folder / f"step-{state.step:08d}"
    with storage.new_folder(here) as beside:
        write_tensors({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, beside / TENSORS)
        tree = {"progress": asdict(state), "facts": plain(inputs), "sha256": storage.sha256(beside / TENSORS)}
        tree["state_sha256"] = storage.json_sha256(tree)
        storage.write_json(beside / STATE, tree)
    found = _newest_first(folder)
    # One of a later step was left out as damaged, because the run has not continued from it.
    later = [each for each in found if each > here]
    for old in [*later, *found[len(later) + KEEP :]]:
        shutil.rmtree(old, ignore_errors=True)


def restore(
    folder: Path,
    parts: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    inputs: RunInputs,
    buffers: Mapping[str, Tensor] = MappingProxyType({}),
) -> TrainState | None:
    """Load the newest undamaged checkpoint into `parts` and `optimizer`; None if there is none.

    For a damaged checkpoint there is a warning, and the one before it is used. If package versions, commit, device or
    processor have changed, there is a warning, and the state says so (`continued_from`). If the data, the base model or
    what makes its tokens has changed, this is an error.

    Args:
        buffers: the arm's other tensors, by name. Those that the checkpoint has are changed in place.

    Raises:
        UserError: the checkpoint was trained on other data, another base model or other tokens.
    """
    own = _of_arm(parts, buffers)
    for candidate in _newest_first(folder):
        try:
            state, saved, tensors = _read(candidate, own)
        except (UserError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("checkpoint %s is damaged (%s); it is left out", candidate, error)
            continue
        made_before = max((earlier.step for earlier in state.continued_from), default=0)
        if _compare(saved, inputs, candidate) and state.step > made_before:
            state.continued_from.append(ContinuedFrom(state.step, saved.code, saved.versions, saved.execution))
        with torch.no_grad():
            for key in own.keys() & tensors.keys():
                own[key].copy_(tensors[key])
        _load_optimizer(tensors, parts, optimizer)
        return state
    return None


def _of_arm(parts: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The name in a checkpoint -> the arm's tensor."""
    return {f"part/{name}": each for name, each in parts.items()} | {f"buffer/{n}": each for n, each in buffers.items()}


def _read(candidate: Path, own: Mapping[str, Tensor]) -> tuple[TrainState, RunInputs, dict[str, Tensor]]:
    tree = storage.read_json(candidate / STATE)
    if storage.sha256(candidate / TENSORS) != tree["sha256"]:
        raise ValueError("its tensors are not those it was written with")
    if tree.pop("state_sha256") != storage.json_sha256(tree):
        raise ValueError("its state is not the one it was written with")
    state, inputs = typed(TrainState, tree["progress"]), typed(RunInputs, tree["facts"])
    tensors = load_file(candidate / TENSORS)
    stored = {key: tensor.shape for key, tensor in tensors.items() if not key.startswith("optimizer/")}
    for key in sorted({*stored, *(key for key in own if key.startswith("part/"))}):
        if key not in own or stored.get(key) != own[key].shape:
            raise ValueError(f"{key} is missing, is not of this run, or has another shape")
    return state, inputs, tensors


def _load_optimizer(
    tensors: dict[str, Tensor], parts: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    # The optimizer knows which of its tensors belong on which device: a fused AdamW counts its steps on the GPU, any
    # other one on the CPU. A checkpoint has no groups, because learning rates follow from the step.
    own = optimizer.state_dict()
    name_of = {parameter: name for name, parameter in parts.items()}
    in_order = [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    own["state"] = {
        index: {key.rpartition("/")[2]: value for key, value in tensors.items() if key.startswith(f"optimizer/{name}/")}
        for index, name in enumerate(in_order)
    }
    optimizer.load_state_dict(own)


def kept_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints that are kept, the newest first."""
    return [int(path.name.removeprefix("step-")) for path in _newest_first(folder)]


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*[0-9]"), reverse=True)


def _compare(saved: RunInputs, now: RunInputs, where: Path) -> bool:
    """Whether the inputs have changed since the checkpoint; each change that is allowed is a warning."""
    # What decides tokens is among the versions, if it was recorded.
    recorded = [name for name in (CHAT_TEMPLATE, TOKEN_FILES) if name in saved.versions]
    tokens = [(name, saved.versions[name], now.versions.get(name)) for name in recorded]
    for name, before, after in (("data", saved.data, now.data), ("base weights", saved.base, now.base), *tokens):
        if before != after:
            raise UserError(
                f"{where}: was trained on other {name} ({before}, now {after}); "
                f"restore it, or remove {where.parent} to start from the first step"
            )
    packages = {*saved.versions, *now.versions}
    different = sorted(name for name in packages if saved.versions.get(name) != now.versions.get(name))
    then, today = ({name: inputs.versions.get(name) for name in different} for inputs in (saved, now))
    values = (
        ("versions", then, today),
        ("code", saved.code, now.code),
        ("device", saved.execution.device_and_threads, now.execution.device_and_threads),
        ("processor", saved.execution.processor, now.execution.processor),
    )
    changes = [(name, was, is_now) for name, was, is_now in values if was != is_now]
    for change in changes:
        log.warning("resuming with other %s: %s, now %s", *change)
    return bool(changes)
