"""The report: it reads the files of finished runs, and writes tables, intervals, figures, claims and one page.

This package compares finished runs. It groups runs and chooses learning rates (groups), computes numbers (compare),
answers claims (claims, answers), and shows numbers (values and tables, then formats, page and plots). Numbers stay
typed values until formats, page or plots writes them. The package imports records/, statistics/, config/, tasks/ and
what is below them, and never torch or transformers. Only wandb_dashboard loads W&B's packages, when it is used.
"""
