"""What can be chosen, and what a choice means: the schema, composing and checking it, a run's identity and its command.

Imports the modules at the top of the package, Hydra and OmegaConf; no other package.
"""
