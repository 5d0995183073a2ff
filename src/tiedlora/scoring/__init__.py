"""From a prompt to a metric with its interval, in this order:

1. passes.py     which passes over a split give the metrics that are wanted: answers, losses or both;
2. split.py      scores one split: the adapted model, and the base model beside it;
3. predict.py    asks the model every example: for an answer, which the task scores, or for the loss of its target;
4. decoding.py   generates answers, and likelihoods.py compares given ones;
5. passages.py   the neutral text whose loss measures forgetting;
6. summary.py    the metrics of a split with their 95 % intervals.

passes.py, passages.py and summary.py import no torch, so that finished runs are checked without it. The package may
import training (the loss), tracking (the progress bar), analysis (the intervals), data, models, tasks, adapter, records
and config.
"""
