"""From a task's examples to tensors: encoding as token ids, their cache on disk, batches.

Knows neither adapters nor training. May import models, tasks, records, config and the modules below.
"""
