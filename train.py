"""python train.py [tying=TABuv] [task=gsm8k] [rank=r8] [train.lr=3e-3] ...: one run; with --multirun, many runs."""

import os

from tiedlora.training import signals

if __name__ == "__main__":
    # Before the imports below, which take seconds.
    signals.end_at_once()

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from tiedlora import errors
from tiedlora.config import compose
from tiedlora.config.explain import readable_errors
from tiedlora.runs import run

compose.register()


@hydra.main(config_path="conf", config_name="config", **compose.VERSION_BASE)
def main(composed: DictConfig) -> None:
    with errors.exit_codes():
        for group, plain in (("hydra/sweeper", "resuming"), ("hydra/launcher", "basic")):
            if (option := HydraConfig.get().runtime.choices[group]) != plain:
                raise errors.UserError(f"{group}={option}: is for a sweep; add --multirun, or leave it out")
        compose.check_words(HydraConfig.get().overrides.task)
        run.main(compose.load(composed))


if __name__ == "__main__":
    # With this, Hydra raises errors that it would print in many lines, and readable_errors makes one line of them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with errors.exit_codes(), readable_errors():
        main()
