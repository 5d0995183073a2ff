"""Scoring a split: greedy decoding, likelihoods of given texts, prediction rows, metrics with intervals.

May import training (its loss), data, models, tasks, adapter, records, config, statistics and the modules below.
scoring.summary is free of torch, so that finished runs can be checked without it.
"""
