"""The life of one run. A run passes through these files in this order:

1. run.py       `python train.py`: a finished run is checked and printed, any other is carried out;
2. inputs.py    the rows and the base model that a run depends on, read without torch;
3. lazy.py      imports torch, and with it the files below, only when they are needed;
4. execute.py   load, train, save, score, record; in several processes the first one writes;
5. session.py   the parts, loaded and checked: rows as token ids, base model, adapter;
6. trainer.py   the loop with everything that it calls, from the newest checkpoint to the last step;
7. recording.py the record, built once.

Later: add_scores.py scores more splits, verify.py and regenerate.py check a run (findings.py), library.py
loads one back; process_cache.py keeps what the next run of the same process can use; process_device.py sets up its
device; device_speed.py measures for a forecast.

It may import every package but sweeps, report and export. run.py, inputs.py and verify.py import no torch.
"""
