"""Sweeps: many runs from one command.

    expand.py, cell_composer.py    from the words of a command to its cells (cells.py)
    launching.py                   carry a sweep out: what its command does, and what each worker does
    launchers.py                   where workers run
    staged.py, staged_search.py    a search of learning rates: what is launched, and the pure decision
    deciding.py                    the seeds that open claims need
    status.py, watch.py            the state of every cell, once or again and again
    forecast.py, selection.py      what a sweep will cost, and the rate of every configuration
    control.py, study.py           drop and retry, and sweeps planned in a file

A cell is a run like any other. The state of a sweep is read from its runs' folders, so there is no second state that
could differ; only what a person asks of a running sweep is in the sweep's own folder.

It may import every other package but page. No module here imports torch, so it is quick to plan a sweep and to skip
finished cells; torch is imported inside functions alone. expand.py, cell_composer.py and launchers.py import Hydra, and
the plug-in src/hydra_plugins/sweepers.py connects the sweepers to it.
"""
