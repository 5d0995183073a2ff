"""Where metrics go while a run trains: always to metrics.jsonl, and to the tracker that `tracking.backend` names.

Each tracker is one file with a `TRACKER` class, and one option of conf/tracking. The package imports records and
config.
"""
