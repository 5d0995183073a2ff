"""A run's folder and what its files hold, as typed values: the record, predictions, metrics, the code that made them.

Imports config, statistics and the modules at the top; no torch, no Hydra. All packages above read finished runs here.
"""
