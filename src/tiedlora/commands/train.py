"""python train.py [tying=TABuv] [task=gsm8k] [rank=r8] [train.lr=3e-3] ...: one run; with --multirun, many runs."""

import argparse
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from tiedlora import errors
from tiedlora.config import compose, own_model
from tiedlora.config.explain import readable_errors
from tiedlora.places import CONF
from tiedlora.runs import run


@hydra.main(config_path=str(CONF), config_name="config", **compose.VERSION_BASE)
def composed_run(composed: DictConfig) -> None:
    with errors.exit_codes():
        for group, plain in (("hydra/sweeper", "resuming"), ("hydra/launcher", "basic")):
            if (option := HydraConfig.get().runtime.choices[group]) != plain:
                raise errors.UserError(f"{group}={option}: is for a sweep; add --multirun, or leave it out")
        compose.check_words(HydraConfig.get().overrides.task)
        run.main(compose.load(composed))


def main(words: list[str]) -> None:
    compose.register()
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--config-dir", "-cd", type=Path)
    if own := flags.parse_known_args(words)[0].config_dir:
        compose.check_names(own)
    # With this, Hydra raises errors that it would print in many lines, and readable_errors makes one line of them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra reads them from there.
    sys.argv[1:] = own_model.with_option(words)
    with readable_errors():
        composed_run()
