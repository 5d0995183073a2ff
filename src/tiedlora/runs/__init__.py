"""The life of one run: print a finished one, else load, train, score and record; add scores, verify, load back.

May import everything below: report, export, scoring, training, tracking, data, models, tasks, adapter, records, config.
run.py, inputs.py and verify.py import no torch. What does is called through lazy.py, the one door to torch.
"""
