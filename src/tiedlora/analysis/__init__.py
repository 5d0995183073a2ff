"""From finished runs to numbers and verdicts: groups, estimates with their intervals, claims, planned looks.

This package reads finished runs (runs, scorebook), groups them and chooses learning rates (groups), computes scores and
differences with their intervals (estimates, compare, shares), and answers claims (claims, partners, answers). Its
statistics take numbers and return numbers: intervals, bootstrap, crossed, rules, looks. It knows no table and no page.
It imports records, tasks, config and the modules at the top of the package, and never torch or transformers.
"""
