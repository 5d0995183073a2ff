"""Rows of one's own, by configuration alone: files or a data set of the hub, templates, and metrics by name.

A row becomes prompt and target by `task.prompt` and `task.target`, or by one field of chat messages (`task.messages`).
The answer is generated, or chosen among `task.choices`. A subclass may score in another way.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from tiedlora import storage
from tiedlora.config.schema import SCORED_SPLITS, SPLITS, TaskConfig
from tiedlora.config.task_rows import files_below
from tiedlora.errors import UserError
from tiedlora.tasks.base import OF_OWN_ROWS, Example, Score, Task, cluster_of, fields_of, render
from tiedlora.tasks.metrics import (
    CHOSEN,
    CORPUS,
    FORMS,
    GENERATED,
    ROUGES,
    choice_accuracies,
    corpus_counts,
    corpus_score,
    corpus_signature,
    exact_match,
    has_no_blanks,
    has_rouge_words,
    rouge,
    rouge_signature,
    token_f1,
)
from tiedlora.tasks.rows import (
    ChangedRows,
    DataRow,
    NoSuchSplit,
    RowError,
    in_one_form,
    placed,
    reachable_hub,
    read_file,
)
from tiedlora.text import nearest

NORMALISED = ("exact_match", "token_f1")
"""The metrics that compare forms of an answer (task.normalise)."""
OF_WORDS = ("token_f1", "bleu")
"""The metrics whose words have blanks between them. ROUGE has a rule of its own (has_rouge_words)."""
SOURCES = "give task.files=FILE (or task.files={train: FILE, validation: FILE, test: FILE}), or task.hub.id=ORG/NAME"


class OwnRows(Task):
    """Rows of one's own (task=rows), or a class of one's own that scores them in another way."""

    reads_own_rows = True

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        # A subclass has metrics of its own.
        self.metrics = self.metrics or tuple(config.metrics)
        self.corpus_metrics = self.corpus_metrics or tuple(name for name in config.metrics if name in CORPUS)
        # A data set of the hub cannot be corrected: its training rows that are scored too are left out (_read_rows).
        self.one_split_each = config.files.train is not None
        # Each split is read once, because others are cut from it and compared with it.
        self._kept_rows = functools.cache(self._read_rows)
        self._kept_splits = functools.cache(self._find_splits)

    # What is asked, before a row is read.

    @override
    def check_options(self) -> None:
        super().check_options()
        if self.config.hub.id and self.one_split_each:
            raise UserError(f"task.hub.id={self.config.hub.id}: task.files names the rows; leave one of them out")
        if not type(self).metrics:
            self._check_metrics()

    def _check_metrics(self) -> None:
        known = CHOSEN if self.config.choices is not None else GENERATED
        if not self.metrics:
            raise UserError(f"task.metrics: names no metric; choose from {', '.join(known)}")
        for name in self.metrics:
            if name in CHOSEN and known is GENERATED:
                raise UserError(f"task.metrics={name}: needs task.choices, the possible answers, as in [yes,no]")
            if name in GENERATED and known is CHOSEN:
                raise UserError(
                    f"task.metrics={name}: is of generated answers, and with task.choices none is generated; choose "
                    f"from {', '.join(CHOSEN)}, or leave task.choices out"
                )
            if name not in known:
                raise UserError(
                    f"task.metrics={name:.80}: no such metric; choose from {', '.join(known)}{nearest(name, known)}"
                )
        if self.config.normalise != OF_OWN_ROWS["normalise"] and not {*NORMALISED} & {*self.metrics}:
            raise UserError(
                f"task.normalise={self.config.normalise}: changes only {' and '.join(NORMALISED)}, and task.metrics "
                "names neither; add one, or leave it out"
            )

    @override
    def check_templates(self) -> None:
        config = self.config
        if config.messages is not None:
            if config.prompt or config.target or config.choices is not None:
                raise UserError(
                    "task.messages: its last message is the target, and the others are the prompt; leave out "
                    "task.prompt, task.target and task.choices"
                )
            return
        for name in ("prompt", "target"):
            if not getattr(config, name):
                raise UserError(
                    f"task.{name}: is empty; write a template over the columns of your rows, such as {{question}}, or "
                    "name the column of chat messages in task.messages"
                )
        super().check_templates()
        if config.prompt.endswith(" ") and not config.chat_template:
            # The blank would be a token of its own, and most tokenizers have it in the first word of what follows.
            raise UserError(
                "task.prompt: ends with a blank, which belongs to the beginning of task.target, as in "
                "task.prompt='... Answer:' task.target=' {answer}'; move it there"
            )
        prompt, target = fields_of(config.prompt), fields_of(config.target)
        if target and {*target} <= {*prompt}:
            raise UserError(
                f"task.target={config.target!r:.200}: task.prompt has {{{target[0]}}} too, so the model would be told "
                "its answer; take it out of one of the two"
            )
        if config.choices is not None and len(target) != 1:
            raise UserError(
                f"task.target={config.target!r:.200}: with task.choices, it must name one field, which holds the right "
                "choice and stands for each of them"
            )
        if not target:
            raise UserError(
                f"task.target={config.target!r:.200}: names no field of a row, so every answer would be the same; "
                "write one in braces, such as {answer}"
            )
        for template in config.choices if isinstance(config.choices, list) else []:
            fields_of(template)

    # Where the rows are.

    @override
    def rows(self, split: str, data_root: str | None) -> list[DataRow]:
        if split not in self._kept_splits(data_root):
            have = " and ".join(self._kept_splits(data_root)) or "none"
            raise NoSuchSplit(
                f"task={self.config.name}: there are no {split} rows, only {have}; give task.files.{split}=FILE, or "
                f"leave {split} out of score.splits"
            )
        return self._kept_rows(split, data_root)

    @override
    def cut_from_train(self, data_root: str | None) -> dict[str, int]:
        splits = self._kept_splits(data_root)
        if (wished := self.config.validation_from_train) and self.config.files.validation:
            raise UserError(
                f"task.validation_from_train={wished}: changes nothing, because task.files.validation names the "
                "validation rows; leave one of them out"
            )
        # Who gives validation rows and no test rows has perhaps put them away.
        missing = SCORED_SPLITS if "validation" not in splits and "test" not in splits else ("validation",)
        cut = [split for split in missing if split not in splits]
        return {split: self.config.validation_from_train if split == "validation" else 0 for split in cut}

    @override
    def ties(self, row: DataRow, number: int) -> list[str]:
        """Rows with the same prompt stay in one split, and rows of one cluster."""
        cluster = cluster_of(row, self.config.cluster)
        # The whole example is made, so that the first wrong row of a file is named, whichever split gets it.
        return [f"prompt {in_one_form(self.example(row, '').prompt)}", *([f"cluster {cluster}"] if cluster else [])]

    def _prompt(self, row: DataRow) -> str:
        """The prompt of a row, whose answer may be hidden: the hub's test rows often have an empty one."""
        config = self.config
        with placed(row):
            if config.messages is None:
                return self._prompt_of_fields(row)
            turns = self._turns(row, config.messages)
            return _prompt_of_turns(turns[:-1] if turns[-1:] and turns[-1]["role"] == "assistant" else turns)

    def _find_splits(self, data_root: str | None) -> dict[str, Path | None]:
        """The splits that have rows of their own -> their file; None for the hub."""
        files = {split: getattr(self.config.files, split) for split in SPLITS}
        given = {split: Path(file) for split, file in files.items() if file}
        if given := given or files_below(self.config, data_root):
            if "train" not in given:
                raise UserError(f"task.files.train: names no file, and {' and '.join(given)} do; give it too")
            return {**given}
        if not self.config.hub.id:
            raise UserError(f"task.files: names no file; {SOURCES}")
        return dict.fromkeys(self.hub_splits())

    def hub_splits(self) -> dict[str, str]:
        """Our name of a split -> the hub's, which is the same if the configuration does not say."""
        hub = self.config.hub
        if not hub.splits:
            with reachable_hub(self.config):
                import datasets  # reachable_hub has imported it already  # noqa: PLC0415

                assert hub.id
                names = datasets.get_dataset_split_names(hub.id, hub.subset, revision=hub.revision)
            hub = replace(hub, splits={split: split for split in SPLITS if split in names})
            self.config = replace(self.config, hub=hub)
        if "train" not in hub.splits:
            raise UserError(
                f"task.hub.id={hub.id}: has no split train; name the hub's split, as in "
                "'+task.hub.splits={train: NAME}'"
            )
        return hub.splits

    def _read_rows(self, split: str, data_root: str | None) -> list[DataRow]:
        path = self._kept_splits(data_root)[split]
        rows = self.hub_rows(split) if path is None else self._rows_of(path, split, data_root)
        if self.one_split_each or split != "train":
            return rows
        others = [other for other in self._kept_splits(data_root) if other != "train"]
        scored = {in_one_form(self._prompt(row)) for other in others for row in self._kept_rows(other, data_root)}
        return [row for row in rows if not scored or in_one_form(self._prompt(row)) not in scored]

    def _rows_of(self, path: Path, split: str, data_root: str | None) -> list[DataRow]:
        """The rows of a split's file.

        Raises:
            ChangedRows: the run's identity has another file.
        """
        if not path.exists() and data_root:
            # A run that was moved here names a folder of another machine. Two splits may have files of one name.
            places = [Path(data_root, path.parent.name, path.name), Path(data_root, path.name)]
            path = next((place for place in places if place.exists()), path)
        recorded, sha256 = self.config.rows_from.get(split), storage.sha256(path)
        if recorded is not None and sha256 != recorded:
            raise ChangedRows(
                f"{path}: is another file than that of the run's id (sha256 {recorded[:12]}, now {sha256[:12]}); "
                "restore it, or start a run of its own"
            )
        return read_file(path)

    # From a row to an example.

    @override
    def example(self, row: DataRow, id: str) -> Example:
        config = self.config
        if config.messages is not None:
            example = self._of_messages(row, id, config.messages)
        else:
            prompt = self._prompt_of_fields(row)
            example = self._with_choices(row, id, prompt) if config.choices is not None else super().example(row, id)
        return example if example.choices else self._checked_target(example)

    def _prompt_of_fields(self, row: DataRow) -> str:
        names = fields_of(self.config.prompt)
        if not any(str(row.fields.get(name, "x")).strip() for name in names):
            raise RowError(f"the prompt is empty: {', '.join(names)} hold no text")
        return render(self.config.prompt, row)

    def _checked_target(self, example: Example) -> Example:
        """Refuse a target that no answer could equal."""
        target = example.target.strip()
        if stop := next((stop for stop in self.config.stop if stop in target), None):
            raise RowError(f"the target holds {stop!r}, at which an answer ends; set task.stop=[] or another end")
        if {*NORMALISED} & {*self.metrics} and not FORMS[self.config.normalise](target):
            raise RowError(f"nothing is left of the target {target!r:.80} by task.normalise={self.config.normalise}")
        if {*ROUGES} & {*self.metrics} and not has_rouge_words(target):
            raise RowError(
                f"ROUGE sees nothing of the target {target!r:.80} but digits, because rouge-score reads only a to z "
                "and digits; choose task.metrics=[chrf]"
            )
        if (of_words := [name for name in OF_WORDS if name in self.metrics]) and has_no_blanks(target):
            raise RowError(
                f"the target {target!r:.80} has no blanks between its words, so {' and '.join(of_words)} would be 0 "
                "for every other answer; choose task.metrics=[chrf], or exact_match for short labels"
            )
        return example

    def _with_choices(self, row: DataRow, id: str, prompt: str) -> Example:
        config = self.config
        (name,) = fields_of(config.target)
        texts = self._choices(row)
        correct = self._correct_choice(name, render(f"{{{name}}}", row).strip(), texts)
        choices = tuple(render(config.target, row.with_fields(**{name: text})) for text in texts)
        return Example(id, prompt, choices[correct], (str(correct),), choices)

    def _correct_choice(self, name: str, answer: str, texts: list[str]) -> int:
        """Which choice a field of this name means by this answer, which is a choice's text or its number from 0."""
        choices, numbers = self.config.choices, [str(number) for number in range(len(texts))]
        differ_by_row = isinstance(choices, str) or any(fields_of(template) for template in choices or [])
        by_number = numbers.index(answer) if answer in numbers else None
        if answer in texts:
            by_text = texts.index(answer)
            # Choices that are the same for all rows are known to their author. Those of a row may be numbers by chance.
            if differ_by_row and by_number not in (None, by_text):
                raise RowError(
                    f"the field {name!r} is {answer}, which is the text of choice {by_text} and the number of choice "
                    f"{by_number} (from 0); make them differ, such as by a unit behind each choice"
                )
            return by_text
        if by_number is None:
            hint = "; a YAML file reads yes and no as True and False, so write them in quotes"
            raise RowError(
                f"the field {name!r} is {answer!r:.80}, which is no choice of {', '.join(texts):.200}, and no number "
                f"of one from 0 to {len(texts) - 1}{hint if {'True', 'False'} & {*texts} else ''}"
            )
        if not differ_by_row and {*texts} & {*numbers}:
            # The rows whose answer is also a text would go by it, and the others by their number.
            raise RowError(
                f"the field {name!r} is {answer}, which is no choice of {', '.join(texts):.200}; choices that are such "
                "numbers themselves go by their text, and not by their number from 0"
            )
        return by_number

    def _choices(self, row: DataRow) -> list[str]:
        """The texts of a row's choices, without outer blanks."""
        wanted = self.config.choices
        if isinstance(wanted, str):
            values = row.fields.get(wanted)
            if not isinstance(values, list) or not all(isinstance(value, (str, int, float)) for value in values):
                kind = f"is {type(values).__name__}" if wanted in row.fields else "is missing"
                raise RowError(
                    f"the field {wanted!r} of task.choices must be a list of texts, and {kind}; choices of other "
                    "columns are '[{COLUMN},{COLUMN}]' in quotes"
                )
            texts = [str(value).strip() for value in values]
        else:
            texts = [render(template, row).strip() for template in wanted or []]
        if len(texts) < 2 or not all(texts) or len({*texts}) < len(texts):
            raise RowError(f"the choices must be two or more different texts, none empty, and are {texts!r:.200}")
        return texts

    def _of_messages(self, row: DataRow, id: str, name: str) -> Example:
        """The last message is the target, and the others are the prompt."""
        turns = self._turns(row, name)
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise RowError(f"the field {name!r} must end with a message of the assistant, after one that it answers")
        *earlier, last = turns
        if not last["content"].strip():
            raise RowError("the target is empty")
        return Example(id, _prompt_of_turns(earlier), last["content"], (last["content"],))

    def _turns(self, row: DataRow, name: str) -> list[dict[str, str]]:
        """The messages of a row, with their roles and contents alone."""
        if name not in row.fields:
            known = ", ".join(row.fields) or "none"
            raise RowError(f"the field {name!r} of task.messages is missing{nearest(name, row.fields)}; it has {known}")
        turns = row[name]
        if not isinstance(turns, list) or not all(map(_is_message, turns)):
            raise RowError(
                f"the field {name!r} must be a list of messages, each with the texts 'role' and 'content', and is "
                f"{json.dumps(turns, default=str, ensure_ascii=False):.120}"
            )
        if any(turn.get("tool_calls") for turn in turns):
            # The template would show them, and no metric here scores them.
            raise RowError(f"the field {name!r} has tool_calls, which are not trained; leave such rows out")
        return [{"role": turn["role"], "content": turn["content"]} for turn in turns]

    # Scores.

    @override
    def score(self, output: Any, example: Example) -> dict[str, Score]:
        if example.choices:
            return self._choice_scores(output, example)
        # Many tokenizers (Qwen's) give texts in NFC alone, so an answer could never equal a reference of other rows.
        output, *references = (unicodedata.normalize("NFC", text) for text in (output, *example.references))
        form = FORMS[self.config.normalise]
        rouges = tuple(name for name in ROUGES if name in self.metrics)
        found: dict[str, Score] = {**rouge(rouges, output, references, False)} if rouges else {}
        for name in self.metrics:
            if name == "exact_match":
                found[name] = exact_match(output, references, form)
            elif name == "token_f1":
                found[name] = token_f1(output, references, form)
            elif name in CORPUS:
                found[name] = corpus_counts(name, output, references)
        return found

    def _choice_scores(self, log_likelihoods: Sequence[float], example: Example) -> dict[str, Score]:
        # The length of a choice does not include what the template puts around it.
        (name,) = fields_of(self.config.target)
        around = len(render(self.config.target, DataRow("", {name: ""})))
        lengths = [len(choice) - around for choice in example.choices]
        accuracies = choice_accuracies(log_likelihoods, lengths, int(example.references[0]))
        return {name: value for name, value in zip(CHOSEN, accuracies, strict=True) if name in self.metrics}

    @override
    def corpus_score(self, metric: str, statistics: Any) -> float:
        return corpus_score(metric, statistics)

    @override
    def signatures(self) -> dict[str, str]:
        found = dict.fromkeys([name for name in self.metrics if name in ROUGES], rouge_signature(False))
        found |= {name: corpus_signature(name) for name in self.corpus_metrics}
        return found | {name: f"normalise:{self.config.normalise}" for name in self.metrics if name in NORMALISED}


def _prompt_of_turns(turns: list[dict[str, str]]) -> str:
    """The JSON of messages, for the chat template (Encoder)."""
    return json.dumps(turns, ensure_ascii=False)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))


TASK = OwnRows
