"""Where the checkout is: train.py, conf/ and, unless told otherwise, outputs/ and .cache/ lie in it."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
CONF = PROJECT / "conf"
