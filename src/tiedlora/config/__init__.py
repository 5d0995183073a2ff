"""Configuration: the schema, composition from conf/, checks, messages, a run's identity, the command that repeats it.

This package imports Hydra and OmegaConf, and of tiedlora only the modules tying, keys, errors, storage and text.
"""
