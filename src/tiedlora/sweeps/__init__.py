"""Sweeps: many runs from one command.

    expand.py                from the words of a command to its cells
    cells.py                 a cell, a sweep, and how a person steers it while it runs
    launching.py             carry a sweep out: its command, and what each worker does
    launchers.py             start workers: in this process, in others, on other machines
    staged.py                what a search of learning rates launches, and then the seeds that open claims need
    staged_search.py         the decisions of one search, as a pure function
    status.py                the state of every cell, once or again and again
    forecast.py              what a sweep will cost
    selection.py             the rate of every configuration
    study.py                 sweeps planned in a file

A cell is a run like any other. The state of a sweep is read from its runs' folders, so there is no second state that
could differ. The sweep's own folder has its frozen cells, its decisions, and the files that steer it.

It may import every other package but page. No module here imports torch, so it is quick to plan a sweep and to skip
finished cells; torch is imported inside functions alone. expand.py imports Hydra, and the plug-in
src/hydra_plugins/sweepers.py connects the sweepers to it.
"""
