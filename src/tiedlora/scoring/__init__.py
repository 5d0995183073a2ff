"""From a prompt to a metric with its interval, in this order:

1. wanted.py     which passes over a split give the metrics that are wanted: answers, losses or both;
2. split.py      scores one split: asks the adapted model, and the base model beside it, every example;
3. decoding.py   generates answers, and compares the likelihoods of given ones;
4. passages.py   the neutral text whose loss measures forgetting.

The metrics of a split with their 95 % intervals are in analysis/metrics.py. wanted.py and passages.py import no torch,
so that finished runs are checked without it. The package may import training (the loss), tracking (the progress bar),
analysis (the intervals), data, models, tasks, adapter, records and config.
"""
