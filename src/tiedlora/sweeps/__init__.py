"""Sweeps: many runs from one command.

Here belong the cells of a command line (expand.py, cells.py), how one cell and all of them are carried out
(run_cell.py, launching.py, worker_slots.py, watch.py), what has become of each (status.py), and the choice of a
learning rate (selection.py). A cell is a run like any other. Everything that a sweep knows is read from its runs'
folders, so there is no second state that could differ from them.

It may import every other package except report and export. No module here imports torch, so that planning a sweep and
skipping its finished cells take no seconds: runs.lazy is the door to it. expand.py alone knows Hydra; the plug-ins of
src/hydra_plugins/ connect the other modules to it.
"""
