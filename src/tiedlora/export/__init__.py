"""Finished runs in forms that other programs read: PEFT folders, merged weights, model cards, lm-eval tasks.

Also the records of a study, which anyone can check.

This package may import what is below it (models, tasks, adapter, records, config), but neither runs nor page.
"""
