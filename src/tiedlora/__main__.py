"""The command `tiedlora NAME ...`: it finds the command's module, and starts it as the files in scripts/ do.

It imports nothing that takes time, so that --help answers at once.
"""

from __future__ import annotations

import importlib
import resource
import sys

import tiedlora
from tiedlora import errors
from tiedlora.errors import UserError
from tiedlora.text import nearest
from tiedlora.training import signals

COMMANDS = {
    "train": ("one run; with --multirun, a sweep of many", "tying=TABuv task=chain_sum train.steps=100"),
    "generate": ("try a finished run, with base and adapted model side by side", "RUN --prompt '41 + 27 ='"),
    "score": ("score more of a finished run, such as its test rows", "RUN --split test"),
    "export": ("a finished run for other programs: PEFT, merged weights, a card", "RUN --to peft"),
    "verify": ("does a finished run agree with its record?", "RUN"),
    "report": ("tables, intervals, figures and claims of finished runs, as one page", "outputs --out report"),
    "compare": ("is B better than A? Two runs, files of predictions, or outputs of lm_eval", "RUN_A RUN_B"),
    "sweep": ("what a sweep will cost, what it does now, what it chose", "plan tying=LoRA,TABuv seed=0,1"),
    "study": ("a planned comparison, and its records", "plan studies/NAME"),
    "params": ("trainable parameters of every configuration: no weights, no network", "model=llama2_7b rank=r8"),
    "fetch_data": ("copy a task's rows from the hub, for machines without it", "task=gsm8k data_root=FOLDER"),
    "wandb_dashboard": ("W&B workspaces of finished runs", "outputs --entity TEAM"),
    "gpu": ("tests and measurements on a GPU (needs a checkout)", "--rehearse"),
}
"""Name, which is that of the module in commands/ -> what it does, and the words of an example."""
LOADS_MODELS = ("train", "generate", "score", "export", "verify")
"""Commands that always import torch and load a model. (`study` and `sweep` do so for some of their first words.)"""
LEAST_ADDRESS_SPACE = 1_200_000 * 1024
"""Bytes. With less (`ulimit -v`), torch or another library ends the process while it is imported, without a message."""
STOPS_AT_ONCE = ("train", "score", "study")
"""Commands that a signal ends with the code of a stop from their first moment on, and not only Ctrl-C."""


def main() -> None:
    """The console command: `tiedlora` and `python -m tiedlora`."""
    name, *words = sys.argv[1:] or [""]
    with errors.exit_codes():
        if name in ("", "-h", "--help"):
            print(overview())
            raise SystemExit(0 if name else errors.MISTAKE)
        if name == "--version":
            print(f"{errors.CONSOLE} {tiedlora.__version__}")
            return
        if name not in COMMANDS:
            known = f"{nearest(name, COMMANDS)}; `tiedlora --help` shows all commands"
            raise UserError(f"{name!r:.80}: no such command{known}")
    # What argparse, Hydra and messages (errors.as_called) show as the program.
    sys.argv = [f"{errors.CONSOLE} {name}", *words]
    start(name, words)


def start(name: str, words: list[str]) -> None:
    """Carry out a command.

    Args:
        words: those of the command line, after the command's name.

    Raises:
        SystemExit: as errors.exit_codes.
    """
    if name in STOPS_AT_ONCE:
        # Before the import, which takes seconds.
        signals.end_at_once()
    with errors.exit_codes():
        if name in LOADS_MODELS:
            check_address_space()
        importlib.import_module(f"tiedlora.commands.{name}").main(words)


def check_address_space() -> None:
    """Refuse a limit under which the libraries cannot be imported.

    Raises:
        UserError: naming the limit.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < LEAST_ADDRESS_SPACE:
        raise UserError(
            f"ulimit -v {limit // 1024}: torch and its libraries alone need {LEAST_ADDRESS_SPACE // 1024}, and a model "
            "needs more; raise it (`ulimit -v unlimited`)"
        )


def overview() -> str:
    """The text of `tiedlora --help`."""
    lines = ["tiedlora COMMAND ...: fine-tune with Tied-LoRA, and find out how good it is.", ""]
    for name, (summary, example) in COMMANDS.items():
        lines += [f"  {name:<16} {summary}", f"  {'':<16}   tiedlora {name} {example}"]
    return "\n".join([*lines, "", "`tiedlora COMMAND --help` explains a command. RUN is a run's folder in outputs/."])


if __name__ == "__main__":
    main()
