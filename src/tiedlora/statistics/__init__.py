"""Intervals, and what is decided and planned from them: numbers in, numbers out.

This package has estimates with their intervals (over examples, over seeds, over both), the bootstrap, the coverage of
these intervals, the decision rules of claims, planned looks with the chance that they decide, and outlying seeds. It
imports numpy and scipy, and no other package of tiedlora. It knows no run, no task and no table.
"""
