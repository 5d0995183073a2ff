"""A run's folder, and the content of its files as typed values: the record, scores, metrics, the code's version.

This package imports config and the modules of tiedlora itself, and no torch or Hydra. All higher packages
read finished runs through it.
"""
