"""The report: finished runs' files in; tables, intervals, figures, claims and one page out. It imports no torch."""
