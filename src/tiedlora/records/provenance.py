"""Which code, which packages and which device made a result."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

import tiedlora
from tiedlora.places import PROJECT
from tiedlora.reading import Flag, StoredCount, StoredText

STUDY_RECORDS = "studies/*/runs/**"
"""The records of studies, from the top of the checkout."""
PACKAGES = (
    "torch",
    "numpy",
    "transformers",
    "tokenizers",
    "accelerate",
    "bitsandbytes",
    "gguf",
    "safetensors",
    "datasets",
    "evaluate",
    "sacrebleu",
    "rouge-score",
    "peft",
    "reasoning-gym",
    "hydra-core",
    "scipy",
)
"""The packages that a result depends on. Their versions are recorded, beside our own."""
CHAT_TEMPLATE = "chat template"
"""The entry beside them that holds the digest of the chat template, for a task that uses one."""
TOKENIZER = "tokenizer"
"""The entry beside them that holds the digest of the tokenizer's rules, for a model in a folder."""
TOKEN_FILES = "token files"
"""The entry with the digest of what else decides tokens in a model's folder: vocabularies, merges, chat templates."""
TARGET_BLANK, LEFT_OUT = "target blank", "left out"
"""The entry for a tokenizer that adds a blank before every text, and its value."""


@dataclass(frozen=True)
class CodeVersion:
    """The code that ran: a commit of a checkout or, without one, a version of the package."""

    commit: StoredText | None
    """None outside a git checkout. Then the code may be any, also changed by hand."""
    dirty: Flag | None
    """Whether the checkout had uncommitted changes; None outside a git checkout."""
    version: StoredText | None = None
    """The package's version, where no commit is known; None in records before this key."""

    @property
    def short(self) -> str:
        """The start of the commit or, without one, the version."""
        return self.commit[:8] if self.commit is not None else f"version {self.version or 'unknown'}"

    def __str__(self) -> str:
        if self.commit is None:
            return self.short
        return f"commit {self.commit}{' with uncommitted changes' if self.dirty else ''}"


@dataclass(frozen=True)
class Execution:
    """Where a run was carried out. This is not part of the run's identity, but it changes rounding."""

    device: StoredText
    """`cpu`, or the GPU's name."""
    threads: Annotated[StoredCount, Field(ge=1)] | None = None
    """CPU threads of torch; None on a GPU."""
    processes: StoredCount = 1
    """How many processes trained together."""
    processor: StoredText | None = None
    """The CPU's model and its vector instructions; None on a GPU, and in records before this key."""

    @property
    def device_and_threads(self) -> str:
        """Device, threads and processes, in words."""
        threads = f", {self.threads} threads" if self.threads is not None else ""
        return f"{self.device}{threads}" + (f", {self.processes} processes" if self.processes > 1 else "")

    def __str__(self) -> str:
        return self.device_and_threads + (f", {self.processor}" if self.processor is not None else "")

    def rounds_as(self, other: Execution) -> bool:
        """Whether both are the same kind of device. False if a record does not name its processor."""
        known = self.threads is None or self.processor is not None
        return known and (self.device, self.processor) == (other.device, other.processor)


@dataclass(frozen=True)
class ContinuedFrom:
    """How the first steps of a run were made. The run then continued with other code, packages, or elsewhere."""

    step: StoredCount
    """The last of these steps."""
    code: CodeVersion | None
    versions: dict[str, str]
    """Package -> installed version."""
    execution: Execution


@functools.cache
def code_version() -> CodeVersion:
    """The commit of this checkout at the first call, and whether it has uncommitted changes; or the package's version.

    A process goes on with the code that it has read, whatever is committed while it runs. The records that a study
    writes while it runs are results, and no part of the code.
    """
    status = git("status", "--porcelain", "--", ".", f":(exclude,glob){STUDY_RECORDS}")
    commit = git("rev-parse", "HEAD")
    return CodeVersion(commit, None if status is None else bool(status), None if commit else tiedlora.__version__)


def git(*arguments: str) -> str | None:
    """The output of git; None outside a git checkout, or if git is missing."""
    # An installed package, or a copy of the files, may be inside another repository, whose commits are not this code's.
    if PROJECT is None or not (PROJECT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(PROJECT), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


_version = functools.cache(importlib.metadata.version)
"""A file is parsed for it, and a run asks for each of its scores. A package that is not there is looked for again."""


def package_versions() -> dict[str, str]:
    """Package -> installed version, for Python and the packages of PACKAGES that are installed."""
    versions = {"python": platform.python_version(), "tiedlora": tiedlora.__version__}
    for package in PACKAGES:
        try:
            versions[package] = _version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
