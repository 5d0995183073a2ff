"""The folder of the checkout. It contains train.py, conf/ and, by default, outputs/ and .cache/."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
CONF = PROJECT / "conf"
