"""The life of one run. `python train.py` goes through four files:

1. commands/train.py  composes the configuration;
2. run.py             a finished run is checked and printed, any other is carried out;
3. trainer.py         load, train, save, score, record; in several processes the first one writes;
4. training/loop.py   the steps.

inputs.py has the rows and the digest of the base model that a run depends on. loading.py makes what it trains and
scores with, and reward.py is the objective of that name. Later: add_scores.py scores more splits, verify.py checks a
run, library.py loads one back.

It may import every package but sweeps and page. run.py and inputs.py import no torch.
"""
