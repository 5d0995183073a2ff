"""Sweeps: many runs from one command.

This package lists the cells of a command line (expand.py, cells.py), carries them out (run_cell.py, launching.py,
worker_slots.py, watch.py), shows their states (status.py), and chooses a learning rate (selection.py). A cell is a run
like any other. The state of a sweep is read from its runs' folders, so there is no second state that could differ.

It may import every other package except report and export. No module here imports torch, so it is quick to plan a sweep
and to skip finished cells; runs.lazy imports torch when it is needed. Only expand.py imports Hydra. The plug-ins in
src/hydra_plugins/ connect the other modules to Hydra.
"""
