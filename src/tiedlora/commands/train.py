"""python train.py [tying=TABuv] [task=gsm8k] [rank=r8] [train.lr=3e-3] ...: one run; with --multirun, many runs."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from tiedlora import errors
from tiedlora.config import compose, own_model
from tiedlora.config.explain import readable_errors
from tiedlora.config.identity import run_id
from tiedlora.config.schema import Config
from tiedlora.other_methods import FULL, REGISTERED
from tiedlora.places import CONF
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run
from tiedlora.text import nearest

_OF_THIS_ARM = re.compile(
    r"[+~]*(tying(?!\.(targets|layers|dropout)\b)|train\.lr|train\.lr_factor|train\.init_from|force)\b"
)
"""The words that another arm does not share. Where an adapter sits, and its dropout, are no part of the arm."""
COMPLETION = ("--shell-completion", "-sc")
FLAGS = (
    *("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r"),
    *("--multirun", "-m", *COMPLETION, "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
)
"""Hydra's. For another one, its parser would print all of them and no line that helps."""


@hydra.main(config_path=str(CONF), config_name="config", **compose.VERSION_BASE)
def composed_run(composed: DictConfig) -> None:
    with errors.exit_codes():
        for group, plain in (("hydra/sweeper", "resuming"), ("hydra/launcher", "basic")):
            if (option := HydraConfig.get().runtime.choices[group]) != plain:
                raise errors.UserError(f"{group}={option}: is for a sweep; add --multirun, or leave it out")
        words = HydraConfig.get().overrides.task
        compose.check_words(words)
        compose.check_files(words)
        config = compose.load(composed)
        folder = RunFolder(Path(config.outputs) / run_id(config))
        is_new = config.force or not folder.result_file.exists()
        if run.main(config) is not None and is_new:
            print(errors.as_called(next_steps(config, folder.path, sys.argv[1:])))


def next_steps(config: Config, folder: Path, words: Sequence[str]) -> str:
    """Three commands for a run that has just been trained.

    Args:
        words: those of its command line.
    """
    run_name, outputs = (shlex.quote(_shown(path)) for path in (folder, Path(config.outputs)))
    other = "TABuv" if config.tying.name == "LoRA" else "LoRA"
    shared = [word for word in words if not _OF_THIS_ARM.match(word)]
    # PEFT knows neither all weights nor the methods that another program has registered.
    method = config.tying.method
    form = "merged" if method == FULL else "hub-card" if method in REGISTERED else "peft"
    lines = {
        "ask it": f"python scripts/generate.py {run_name}",
        f"compare with {other}": f"python train.py {shlex.join([*shared, f'tying={other}'])} && "
        f"python scripts/report.py {outputs}",
        "use it in PEFT" if form == "peft" else "export it": f"python scripts/export.py {run_name} --to {form}",
    }
    return "\n".join(f"  {what:<22}{command}" for what, command in lines.items())


def _shown(path: Path) -> str:
    """The path as a user of this folder would type it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def check_flags(words: Sequence[str]) -> None:
    """Refuse a flag that there is not, or that cannot work here.

    Raises:
        UserError: naming the flag, and the most similar one.
    """
    for word in words:
        flag = word.partition("=")[0]
        # Hydra takes --multi for --multirun, and -cjob for -c job.
        starts_one = flag[:2] in FLAGS or (flag.startswith("--") and any(known.startswith(flag) for known in FLAGS))
        if flag.startswith("-") and not (flag in FLAGS or starts_one):
            raise errors.UserError(f"{flag:.80}: is no flag of train.py{nearest(flag, FLAGS)}; keys are KEY=VALUE")
        is_sweep = flag == "-m" or (flag.startswith("--m") and "--multirun".startswith(flag))
        if is_sweep and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise errors.UserError(
                f"{flag}: each process of torchrun would train another cell of the sweep; start the sweep without "
                "torchrun, with hydra/launcher=joblib_slots for several GPUs"
            )
        # Hydra's script for a shell would call `tiedlora` without `train`.
        if flag in COMPLETION and sys.argv[0].startswith(f"{errors.CONSOLE} "):
            raise errors.UserError(f"{flag}: is for `python ./train.py` in a checkout only; leave it out")


def main(words: list[str]) -> None:
    check_flags(words)
    compose.register()
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--config-dir", "-cd", type=Path)
    if own := flags.parse_known_args(words)[0].config_dir:
        compose.check_names(own)
    # With this, Hydra raises errors that it would print in many lines, and readable_errors makes one line of them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with readable_errors():
        # Hydra reads them from there.
        sys.argv[1:] = own_model.with_option(compose.without_arm(words))
        composed_run()
