"""The life of one run: print it if it is finished; otherwise load, train, score and record it; score more; verify it.

This package may import everything below: report, export, scoring, training, tracking, data, models, tasks, adapter,
records, config.
run.py, inputs.py and verify.py import no torch. They call code that needs torch only through lazy.py.
"""
