"""Scoring of a split: greedy decoding, likelihoods of given texts, prediction rows, metrics with intervals.

This package may import training (its loss), data, models, tasks, adapter, records, config, statistics and the modules
below.
scoring.summary imports no torch, so finished runs can be checked without it.
"""
