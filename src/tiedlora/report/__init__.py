"""The report: finished runs' files in; tables, intervals, figures, claims and one page out.

Here belongs everything that compares finished runs: which runs form a group and at which learning rate (groups), their
numbers (compare), claims and answers, and how numbers are shown (values and tables, then formats, page and plots).
Numbers stay typed values until formats, page or plots writes them. The package imports records/, statistics/, config/,
tasks/ and what is below them, and never torch or transformers. Only wandb_dashboard loads W&B's packages, when it is
used.
"""
