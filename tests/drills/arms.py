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

import drilling
import torch
from helpers.forks import forked

import tiedlora
from tiedlora.config.compose import compose_config
from tiedlora.config.explain import options
from tiedlora.config.identity import run_id
from tiedlora.config.schema import Config
from tiedlora.config.sizes import trainable_params
from tiedlora.errors import UserError
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run


def config_of(arm: str, model: str, budget: int, outputs: Path) -> Config:
    return compose_config(
        [
            *(f"tying={arm}", f"model={model}", f"budget={budget}", "task=chain_sum", f"outputs={outputs}"),
            *("task.options.rows={train: 32, validation: 4, test: 4}", "task.rows.validation=null", "score.splits=[]"),
            *("train=tiny", "train.steps=4", "train.batch_size=2", "train.warmup_steps=1", "train.dtype=bfloat16"),
            *("train.validate_every=0", "train.validation_rows=2", "train.checkpoint_every=2", "train.threads=1"),
        ]
    )


def folder_of(config: Config) -> RunFolder:
    return RunFolder(Path(config.outputs) / run_id(config))


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(40).reshape(2, 20) + 100
    with torch.inference_mode():
        return model(input_ids=ids).logits


def drill(arm: str, model: str, budget: int, folder: Path) -> str:
    """One line about an arm."""
    whole, killed = (config_of(arm, model, budget, folder / name) for name in ("whole", "killed"))
    record = run.main(whole)
    assert record is not None
    assert record.trainable_params == trainable_params(whole), "another count than scripts/params.py"
    journal = folder / f"{run_id(killed)}.journal"
    code, text = forked(lambda: (drilling.Events(journal, "step 3").install(), run.main(killed)), seconds=600)
    assert code == -signal.SIGKILL, text
    assert folder_of(killed).state() == "interrupted"
    run.main(killed)
    found = drilling.differences(folder_of(killed), drilling.left_by(folder_of(whole)))
    assert not found, f"after the kill, {', '.join(found)} differ"
    base = tiedlora.base_of(folder_of(whole).path).model
    before, state = logits(base), {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = []
    for _ in range(2):
        loaded = tiedlora.load(folder_of(whole).adapter, base)
        adapted.append(logits(base))
        loaded.detach()
        assert torch.equal(logits(base), before), "the base computes otherwise"
    assert torch.equal(*adapted), "other logits when it is loaded again"
    assert not torch.equal(adapted[0], before), "nothing was trained"
    assert base.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items()), "the base has changed"
    assert record.admission is not None
    losses = f"{record.training.validation_loss_first:.3f} -> {record.training.validation_loss_last:.3f}"
    return f"{record.trainable_params:>9,} trained {losses}  {'; '.join(record.admission.marks().values())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--budget", type=int, default=46_080)
    parser.add_argument("--arms", nargs="*", default=[name for name in options("tying") if name.startswith("peft/")])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="arms-"))
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
