"""Which tracker a run has. With tracking=auto it is W&B where this machine is logged in, and no tracker elsewhere.

Nothing here imports a tracker or asks a server: a key in the environment or in ~/.netrc is all that is looked for.
"""

from __future__ import annotations

import configparser
import logging
import netrc
import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from tiedlora.config.schema import Config

log = logging.getLogger(__name__)

AUTO, NONE, WANDB = "auto", "none", "wandb"
WANDB_SERVER = "https://api.wandb.ai"


def backend_of(config: Config) -> str:
    """The tracker's file in this package, or `none`. What `auto` has chosen is logged once in a process."""
    if config.tracking.backend != AUTO:
        return config.tracking.backend
    logged_in = is_logged_in()
    _say(logged_in)
    return WANDB if logged_in else NONE


@cache
def _say(logged_in: bool) -> None:
    if logged_in:
        log.info("tracking: W&B, because this machine is logged in (tracking=none switches it off)")
    else:
        log.info("tracking: only metrics.jsonl, because this machine is not logged in to W&B (`wandb login`)")


def is_logged_in() -> bool:
    """Whether W&B would find a key on this machine. The key itself is not kept."""
    if os.environ.get("WANDB_MODE") == "disabled":
        return False
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _configured_server() or WANDB_SERVER).hostname
    files = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for file in files:
        path = Path(file).expanduser()
        with suppress(OSError, ValueError, netrc.NetrcParseError):
            if path.is_file():
                found = netrc.netrc(path).authenticators(host or "")
                return found is not None and bool(found[2])
    return False


def _configured_server() -> str | None:
    """The server that `wandb login --host` has written to W&B's settings."""
    folder = os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")
    settings = configparser.ConfigParser(interpolation=None)
    with suppress(OSError, ValueError, configparser.Error):
        settings.read(Path(folder).expanduser() / "settings")
        return settings.get("default", "base_url", fallback=None)
    return None
