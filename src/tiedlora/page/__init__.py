"""The report as a person reads it: tables, figures, and one page that opens from disk.

Numbers come from analysis/ as typed values, and stay typed until tables.py, write.py or charts.py writes them.
figures.py has how charts look (styles, markers, sizes; the colours are those of page.css), charts.py what each draws,
and tracks.py the small intervals in rows. This package imports analysis, records, config and what is below them, and
never torch or transformers. Only wandb_dashboard loads W&B's packages, when it is used.
"""
