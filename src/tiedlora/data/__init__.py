"""From a task's examples to tensors: token ids, their cache on disk, batches.

It may import models, tasks, records, config and the modules at the top of the package.
"""
