"""python tests/drills/arms.py [--model smollm2_135m] [--arms peft/vera ...]: the methods of the table, killed once.

Each method trains a few steps at the budget twice: once without interruption, and once with kill -9 after a checkpoint,
continued by the same command. The adapters must have the same bytes. The saved arm must give equal logits when it is
loaded, the counts must be those of scripts/params.py, and without the arm the base must be as it was, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers.forks import forked

from tiedlora.adapter.attach_arm import attach_saved
from tiedlora.config.compose import compose_config
from tiedlora.config.explain import options
from tiedlora.config.identity import run_id
from tiedlora.config.schema import Config
from tiedlora.config.sizes import trainable_params
from tiedlora.errors import UserError
from tiedlora.models.device import resolve_device
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs.trainer import cached_base, carry_out
from tiedlora.training import checkpoint

KILLED_AFTER = 1
"""The checkpoint after which the process is killed. There is one every two steps."""


def config_of(arm: str, model: str, budget: int, outputs: Path) -> Config:
    return compose_config(
        [
            *(f"tying={arm}", f"model={model}", f"budget={budget}", "task=chain_sum", f"outputs={outputs}"),
            *("task.options.rows={train: 32, validation: 4, test: 4}", "task.rows.validation=null", "score.splits=[]"),
            *("train=tiny", "train.steps=4", "train.batch_size=2", "train.warmup_steps=1", "train.dtype=bfloat16"),
            *("train.validate_every=0", "train.validation_rows=2", "train.checkpoint_every=2", "train.threads=1"),
        ]
    )


def run_and_die(config: Config) -> None:
    """The run, until it is killed after a checkpoint."""
    write, saved = checkpoint.save, 0

    def save_and_die(*arguments: object) -> None:
        nonlocal saved
        write(*arguments)  # type: ignore[arg-type]
        saved += 1
        if saved == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save = save_and_die
    carry_out(config)


def adapter_bytes(config: Config) -> dict[str, bytes]:
    folder = RunFolder(Path(config.outputs) / run_id(config))
    return {path.name: path.read_bytes() for path in sorted(folder.adapter.iterdir())}


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(40).reshape(2, 20) + 100
    with torch.inference_mode():
        return model(input_ids=ids).logits


def drill(arm: str, model: str, budget: int, folder: Path) -> str:
    """One line about an arm."""
    whole, killed = (config_of(arm, model, budget, folder / name) for name in ("whole", "killed"))
    base = cached_base(whole, resolve_device("cpu")).model
    before, state = logits(base), {name: tensor.clone() for name, tensor in base.state_dict().items()}
    record = carry_out(whole)
    assert record is not None
    assert record.trainable_params == trainable_params(whole), "another count than scripts/params.py"
    code, text = forked(lambda: run_and_die(killed), seconds=600)
    assert code == -signal.SIGKILL, text
    assert RunFolder(Path(killed.outputs) / run_id(killed)).state() == "interrupted"
    carry_out(killed)
    assert adapter_bytes(killed) == adapter_bytes(whole), "another adapter after the kill"
    saved = RunFolder(Path(whole.outputs) / run_id(whole)).adapter
    loaded = attach_saved(base, saved)
    first = logits(base)
    loaded.detach()
    again = attach_saved(base, saved)
    assert torch.equal(logits(base), first), "other logits when it is loaded again"
    again.detach()
    assert torch.equal(logits(base), before), "the base computes otherwise"
    assert {name: tensor.shape for name, tensor in base.state_dict().items()} == {n: t.shape for n, t in state.items()}
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items()), "the base has changed"
    assert not torch.equal(first, before), "nothing was trained"
    assert record.admission is not None
    losses = f"{record.training.validation_loss_first:.3f} -> {record.training.validation_loss_last:.3f}"
    return f"{record.trainable_params:>9,} trained {losses}  {'; '.join(record.admission.marks().values())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--budget", type=int, default=46_080)
    parser.add_argument("--arms", nargs="*", default=[name for name in options("tying") if name.startswith("peft/")])
    parser.add_argument("--folder", type=Path, help="where the runs go; a new temporary folder if left out")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="arms-"))
    failed = []
    for arm in arguments.arms:
        started = time.monotonic()
        try:
            line = drill(arm, arguments.model, arguments.budget, folder)
        except (AssertionError, UserError) as error:
            failed.append(arm)
            line = f"FAILED: {error}"
        print(f"{arm:<20} {line}  ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"{len(arguments.arms) - len(failed)} of {len(arguments.arms)} arms: the same bytes after kill -9")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
