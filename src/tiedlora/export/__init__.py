"""Finished runs in the forms that other programs read: PEFT folders, merged weights, model cards, lm-eval tasks.

May import what is below it (models, tasks, adapter, records, config); imports neither runs nor report.
"""
