"""Rows from local files or from the hub, each with the place where it was read.

JSON Lines, CSV and TSV are read here, and Parquet and the hub by the package `datasets`. Its readers of the first three
name no line, take a date or a number for what was a text ("007", "NA"), and fill a CSV row that is too short.
"""

from __future__ import annotations

import codecs
import csv
import glob
import io
import json
import re
import tempfile
import textwrap
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiedlora import storage
from tiedlora.config.schema import HubSource, TaskConfig
from tiedlora.config.task_rows import UNNAMED, rows_folder
from tiedlora.errors import UserError
from tiedlora.text import nearest

if TYPE_CHECKING:
    import datasets

PARQUET_BATCH = 1000
"""Rows that are read together."""
CONFIGURATIONS = re.compile(r"(?:available configs|Available): (\[.*\])")
"""The list in an error of `datasets` about a data set of several configurations of which none, or no known one, was
named."""
LARGEST_VALUE = 2**31 - 1
"""The most characters of a value of a CSV file. The limit of Python's csv is 131,072."""


DELIMITERS = {",": ("a comma", ".csv"), "\t": ("a tab", ".tsv"), ";": ("a semicolon", ""), "|": ("a bar", "")}
"""What may stand between columns: its name, and the end of the name of such files, if they are read."""


class RowError(ValueError):
    """A row is wrong. The code that reads the rows adds the row's place to the message."""


class NoSuchSplit(UserError):
    """The task has no such split here."""


class ChangedRows(UserError):
    """A file of rows is not the one that the run's identity has."""


@dataclass(frozen=True)
class DataRow:
    """One row of a data set."""

    where: str
    """The place of the row: `FILE:LINE`, or a split of the hub and a number."""
    fields: dict[str, Any]
    """The fields by name. They come from JSON, so a task checks every field that it uses (Task.fields)."""

    def __getitem__(self, name: str) -> Any:
        """The value of a field. `render` and `Task.fields` report a missing field."""
        return self.fields[name]

    def with_fields(self, **changes: Any) -> DataRow:
        """The row with other values of some fields."""
        return DataRow(self.where, {**self.fields, **changes})


@contextmanager
def placed(row: DataRow) -> Iterator[None]:
    """Add the row's place to an error about it."""
    try:
        yield
    except RowError as error:
        raise UserError(f"{row.where}: {error}") from None


def read_file(path: Path) -> list[DataRow]:
    """Rows of a file with one of the names of ROWS_FILES.

    Raises:
        UserError: the file cannot be read, or a row is wrong; the message names the line.
    """
    match path.suffix.lower():
        case ".csv":
            rows = _read_table(path, ",")
        case ".tsv":
            rows = _read_table(path, "\t")
        case ".parquet":
            rows = _read_parquet(path)
        case _:
            return read_json_lines(path)
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows


def _read_table(path: Path, delimiter: str) -> list[DataRow]:
    """Rows of a UTF-8 table whose first line names the columns. Every value is a text; empty lines are skipped."""
    data = storage.read_bytes(path)
    try:
        # Excel begins its UTF-8 with a byte order mark.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8; save the file as UTF-8") from None
    csv.field_size_limit(LARGEST_VALUE)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    rows, line = [], 1
    try:
        for values in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not values:
                continue
            if delimiter == "\t":
                _refuse_open_quote(where, values)
            if not columns:
                columns = values
                _refuse_delimiter(where, columns, delimiter)
                if doubled := [name for name in columns if columns.count(name) > 1]:
                    raise UserError(f"{where}: two columns have the name {doubled[0]!r:.80}; rename one")
            elif len(values) != len(columns):
                raise UserError(
                    f"{where}: has {len(values)} values for the {len(columns)} columns {', '.join(columns):.200}; "
                    "write quotes around a value that holds a delimiter or a line feed"
                )
            else:
                rows.append(DataRow(where, dict(zip(columns, values, strict=True))))
    except csv.Error as error:
        raise UserError(f"{path}:{line}: is no row of a table ({error}); a quote in quotes is doubled") from None
    return rows


def _refuse_delimiter(where: str, columns: list[str], delimiter: str) -> None:
    """Raises UserError if the head of a table is one column, because others are between its names."""
    if len(columns) == 1 and (found := next((sign for sign in DELIMITERS if sign in columns[0]), None)):
        own, suffix = DELIMITERS[delimiter]
        other, other_suffix = DELIMITERS[found]
        raise UserError(
            f"{where}: has {other} between its columns, and a {suffix} has {own}; "
            + (f"name the file {other_suffix}, or save it with {own}" if other_suffix else f"save it with {own}")
        )


def _refuse_open_quote(where: str, values: list[str]) -> None:
    """Raises UserError if a value of a .tsv has taken in the beginning of another row.

    Most programs write no quotes into a .tsv. There, a sentence that begins with a quote goes on to the next quote. If
    the row still has as many values as there are columns, it went over the end of a line and a tab.
    """
    if value := next((value for value in values if "\t" in value and not {"\n", "\r"}.isdisjoint(value)), None):
        raise UserError(
            f"{where}: a quote opens here, and its value goes on over a tab and the end of a line ({value!r:.80}); if "
            "the quote belongs to the text, write quotes around the value and each of its own quotes twice; otherwise "
            "save the rows as .csv or .jsonl"
        )


def _read_parquet(path: Path) -> list[DataRow]:
    import datasets  # takes more than a second, and other files do not need it  # noqa: PLC0415

    datasets.disable_progress_bars()
    # It prints what it raises, too.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        # A name is a pattern there. The folder gets a lock only.
        with tempfile.TemporaryDirectory() as scratch:
            table = datasets.load_dataset(
                "parquet",
                data_files=glob.escape(str(path)),
                split="train",
                streaming=True,
                cache_dir=scratch,
                # By default it is the size of the first group of rows, and one of an empty file is refused.
                batch_size=PARQUET_BATCH,
            )
            return [DataRow(f"{path} row {number}", row) for number, row in enumerate(table_rows(table), start=1)]
    # pyarrow's errors derive from these.
    except (OSError, ValueError, RuntimeError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({first_line(error)})") from None


def table_rows(table: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    """The rows of a table of `datasets`, with what a template can take.

    A class has its name, and not its number, whose order only the table knows. A hidden one (-1) is None. A number
    of 16 or 32 bits has the fewest digits that give it. Pictures, sounds and films stay encoded: no template takes
    them, and decoding needs more packages.
    """
    import datasets  # as in _read_parquet  # noqa: PLC0415

    table = table.decode(False)
    classes = {name: kind for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)}
    short = {
        name: np.dtype(kind.dtype).type
        for name, kind in table.features.items()
        if isinstance(kind, datasets.Value) and kind.dtype in ("float16", "float32")
    }
    for row in table:
        numbers = {name: row[name] for name in classes}
        hidden = {name: None for name, number in numbers.items() if number in (None, -1)}
        names = {name: classes[name].int2str(numbers[name]) for name in numbers.keys() - hidden.keys()}
        # As text, 19.99 of 32 bits would be 19.989999771118164.
        floats = {name: float(str(kind(row[name]))) for name, kind in short.items() if row[name] is not None}
        yield {**row, **floats, **hidden, **names}


def in_one_form(text: str) -> str:
    """The text as two rows are compared: however a letter is stored, and whichever line ends a file has."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n"))


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_json_lines(path: Path) -> list[DataRow]:
    """Rows of a UTF-8 JSON Lines file; blank lines are skipped.

    The byte order mark that editors on Windows write is no part of a row. It stands at the start of a file, and inside
    one that was joined from several.

    Raises:
        UserError: a line is not UTF-8, not JSON or not an object; the message names the line.
    """
    rows: list[DataRow] = []
    data = storage.read_bytes(path)
    for number, line in enumerate(data.split(b"\n"), start=1):
        line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            fields = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: is not UTF-8 (byte {error.start}); save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            if not rows and _is_json(data):
                raise UserError(
                    f"{where}: is JSON over several lines; write each row as an object in one line"
                ) from None
            raise UserError(f"{where}: is not valid JSON ({error}); correct or remove the line") from None
        if not isinstance(fields, dict):
            raise UserError(f"{where}: must be a JSON object, not {type(fields).__name__}; write one in each line")
        rows.append(DataRow(where, fields))
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


@contextmanager
def hub_errors(config: TaskConfig, split: str) -> Iterator[str]:
    """Yield the hub's name of a split, and turn an error of the hub into one line that says how to get the rows.

    Raises:
        UserError: the task has no such split on the hub, or the block could not load it.
    """
    hub = config.hub
    if not hub.id or split not in hub.splits:
        raise NoSuchSplit(f"task={config.name}: the hub has no {split} split of it. {ways_to_get(config)}")
    with reachable_hub(config):
        yield hub.splits[split]


@contextmanager
def reachable_hub(config: TaskConfig) -> Iterator[None]:
    """Turn an error of the hub into one line that says how to get the rows.

    Raises:
        UserError: the block could not reach the hub, or task.hub.subset names none of several configurations.
    """
    import datasets  # takes more than a second, and rows from a folder do not need it  # noqa: PLC0415

    datasets.disable_progress_bars()
    try:
        yield
    # All errors of huggingface_hub and datasets for an unreachable hub or a missing file derive from these.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if listed := CONFIGURATIONS.search(str(error)):
            subset, names = config.hub.subset, re.findall("'(.*?)'", listed[1])
            what = "has several configurations" if subset is None else f"has no configuration {subset!r:.80}"
            raise UserError(
                f"task.hub.id={config.hub.id}: {what}; set task.hub.subset=NAME{nearest(subset or '', names)}; it has "
                + textwrap.shorten(", ".join(names), 200, placeholder=" ...")
            ) from None
        reason = first_line(error)
        raise UserError(
            f"task={config.name}: {config.hub.id} cannot be loaded ({reason}). {ways_to_get(config)}"
        ) from None


def ways_to_get(config: TaskConfig) -> str:
    """The end of a message about rows that are not there."""
    splits = "{train,test}" if config.validation_from_train else "{train,validation,test}"
    files, then = f"{rows_folder(config, Path())}/{splits}.jsonl", "Then data_root=FOLDER or TIEDLORA_DATA=FOLDER"
    if not config.hub.id:
        return f"Put {files} in your FOLDER. {then}"
    words = [f"task={config.name}"]
    if config.name == UNNAMED:
        usual = HubSource()
        given = {name: value for name, value in vars(config.hub).items() if value != getattr(usual, name)}
        if splits := given.pop("splits", None):
            named = ", ".join(f"{own}: {name}" for own, name in splits.items())
            words.append(f"'+task.hub.splits={{{named}}}'")
        words += [f"task.hub.{name}={value}" for name, value in given.items()]
    return (
        f"Three ways to get it: reach the hub ({config.hub.id}); or, where the hub is in reach, `python "
        f"scripts/fetch_data.py {' '.join(words)} data_root=FOLDER`, and copy FOLDER here; or put {files} with the "
        f"hub's field names in your FOLDER. {then}"
    )
