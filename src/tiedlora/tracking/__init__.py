"""Where metrics go while a run trains: metrics.jsonl always, and the tracker that `tracking.backend` names.

One file a tracker, with a `TRACKER` class, and one option of conf/tracking. Imports records and config.
"""
