"""From a prompt to a metric with its interval, in this order:

1. passes.py       which passes over a split give the metrics that are wanted: answers, losses or both;
2. split.py        scores one split: the adapted model, and the base model beside it;
3. predict.py      asks the model every example, and has the task score each answer (tasks/task_metric.py);
4. engines.py      who generates answers: decoding.py (its steps in steps.py, the ends of answers in answer_ends.py),
   continuous.py or vllm_engine.py; likelihoods.py compares given answers; batches.py has what both share;
5. target_losses.py  the loss of every example's target, without generation;
6. passages.py     the neutral text whose loss measures forgetting;
7. summary.py      the metrics of a split with their 95 % intervals.

memory.py scores a split in smaller batches if memory runs out.

passes.py, passages.py and summary.py import no torch, so that finished runs are checked without it. The package may
import export (PEFT's format, for vLLM), training (the loss), tracking (the progress bar), data, models, tasks, adapter,
records, config and statistics.
"""
