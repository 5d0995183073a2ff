"""Which code and which packages made a result."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess

from tiedlora.config.project import PROJECT
from tiedlora.records.execution import CodeVersion

STUDY_RECORDS = "studies/*/runs/**"
"""The records of studies, from the top of the checkout."""
PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "datasets",
    "evaluate",
    "sacrebleu",
    "rouge-score",
    "reasoning-gym",
    "hydra-core",
    "scipy",
    "tiedlora",
)
"""The packages that a result depends on. Their versions are recorded."""
CHAT_TEMPLATE = "chat template"
"""The entry beside them that holds the digest of the chat template, for a task that uses one."""
TARGET_BLANK, LEFT_OUT = "target blank", "left out"
"""The entry for a tokenizer that adds a blank before every text, and its value."""


def code_version() -> CodeVersion:
    """The commit of this checkout, and whether it has uncommitted changes.

    The records that a study writes while it runs are results, and no part of the code.
    """
    status = _git("status", "--porcelain", "--", ".", f":(exclude,glob){STUDY_RECORDS}")
    return CodeVersion(_git("rev-parse", "HEAD"), None if status is None else bool(status))


def _git(*arguments: str) -> str | None:
    """The output of git; None outside a git checkout, or if git is missing."""
    try:
        done = subprocess.run(["git", "-C", str(PROJECT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def package_versions() -> dict[str, str]:
    """Package -> installed version, for Python and the packages of PACKAGES that are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
