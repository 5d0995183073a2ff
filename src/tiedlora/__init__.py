"""tiedlora: a research harness that tests, reproduces and extends Tied-LoRA (arXiv 2311.09578)."""
