"""Which scores of an admitted arm mean nothing."""

from __future__ import annotations

from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.run_record import Admission


def check_scores_mean_something(admission: Admission, config: Config) -> None:
    """Refuse scores that an arm could get without predicting anything.

    The loss of a target gives the model the target's tokens. An arm that is not causal sees those that it must predict.

    Raises:
        UserError: the run would score losses of an arm that is not causal, or batches of rows that change each other.
    """
    name, score = config.tying.name, config.score
    if not score.splits:
        return
    wants_loss = score.metrics is None or any(map(is_loss, score.metrics)) or score.forgetting is not None
    if not admission.is_causal and wants_loss:
        raise UserError(
            f"tying={name}: is not causal (logits move by {admission.later_tokens:.2g} of the largest one when later "
            "tokens change), so its loss would see what it predicts; score answers only, with "
            "score.metrics=[METRIC] and score.forgetting=null"
        )
    if not admission.is_of_its_row and score.batch_size > 1:
        raise UserError(
            f"tying={name}: a row's answer depends on the other rows of its batch (logits move by "
            f"{admission.other_rows:.2g} of the largest one); score rows singly, with score.batch_size=1"
        )
