"""Sweeps: many runs from one command.

This package lists the cells of a command line (expand.py, cell_composer.py, cells.py), carries them out (run_cell.py,
launching.py, control.py, worker_slots.py, watch.py; staged.py, staged_search.py for a search), shows their states and
their cost (status.py, forecast.py, planned_rows.py), chooses a learning rate (selection.py), and frees what is not
wanted any more (cleaning.py). A cell is a run like any other. The state of a sweep is read from its runs' folders, so
there is no second state that could differ; only what a person asks of a running sweep is in the sweep's own folder.

It may import every other package. No module here imports torch, so it is quick to plan a sweep
and to skip finished cells; torch is imported inside functions alone. Only expand.py and cell_composer.py import Hydra.
The plug-ins in src/hydra_plugins/ connect the other modules to Hydra.
"""
