"""From a task's examples to tensors: token ids, their cache on disk, batches.

This package knows neither adapters nor training. It may import models, tasks, records, config and the modules below.
"""
