"""From finished runs to numbers and verdicts: groups, scores with their intervals, claims and their answers.

This package reads finished runs (runs), groups them and chooses learning rates (groups, rate_choice), computes scores
and differences (comparison), and answers claims (claims, answers, shares). Its statistics take numbers and return
numbers: intervals, rules. It knows no table and no page. It imports tasks, records, config and the modules at the top
of the package.
"""
