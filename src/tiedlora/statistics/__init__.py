"""Intervals and what is planned from them: numbers in, numbers out.

Here belong estimates with their intervals (over examples, over seeds, over both), the one bootstrap, the coverage of
these intervals, and how many seeds and rows a comparison needs. The package imports numpy, scipy and nothing else of
tiedlora: it knows no run, no task and no table.
"""
