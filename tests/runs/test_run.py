"""A run on a tiny random model: record, repeat, curves of scores, refusals."""

import json
import operator
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import processes
from helpers.task_rows import write
from helpers.tiny import folder_of, rows_of, score_more, tiny

from tiedlora import other_methods
from tiedlora.analysis.intervals import mean_loss
from tiedlora.commands.train import next_steps
from tiedlora.config.compose import compose_config
from tiedlora.config.identity import run_id
from tiedlora.config.schema import TrainConfig
from tiedlora.data.batching import BatchSampler
from tiedlora.errors import UserError
from tiedlora.places import PROJECT
from tiedlora.records.rows import read_metrics, read_validation_losses
from tiedlora.records.run_folder import Busy, RunFolder
from tiedlora.records.scores import read_run_scores, read_score_record, read_scores
from tiedlora.runs import inputs, loading, run, trainer
from tiedlora.runs.inputs import SingleSlotCache
from tiedlora.scoring.split import Scorer
from tiedlora.tasks.generated import Generated
from tiedlora.training.distributed import ALONE


def test_the_dropout_of_the_base_model_is_said(tiny_config, caplog):
    caplog.set_level("INFO", "tiedlora")
    loading.load(tiny_config(), ALONE)
    assert "own dropout" not in caplog.text
    loading.load(tiny_config("model=tiny_gpt2"), ALONE)
    assert "the base model's own dropout (0.1) is active in training" in caplog.text
    caplog.clear()
    model = tiny("tiny_llama").model
    model.config.attention_dropout = 0.2
    loading._say_own_dropout(model)
    assert "own dropout (0.2)" in caplog.text, "of a function, and not of a module"


def test_the_record_is_complete(tiny_config, capsys):
    config = tiny_config()
    result = run.main(config)
    folder = folder_of(config)
    tree = json.loads(folder.result_file.read_text())
    assert result == folder.record()
    assert result.to_json() == tree
    assert result.trainable_params == 8 * (32 + 64) + 3 * (8 + 64)  # r (d_in + d_out) + L (r + d_out)
    training = result.training
    assert training.peak_memory_bytes > 0
    rows = read_metrics(folder.metrics_file)
    assert [row.step for row in rows if "train/loss" in row.values] == list(range(1, 7))
    evaluations = read_validation_losses(folder.validation_losses_file)
    assert [(row.step, len(row.losses)) for row in evaluations] == [(step, 12) for step in (0, 3, 6)]
    loss = sum(map(operator.mul, evaluations[-1].losses, evaluations[-1].tokens)) / sum(evaluations[-1].tokens)
    assert loss == pytest.approx(training.validation_loss_last, rel=1e-6)
    assert [path.name for path in sorted(folder.scores.iterdir())] == [
        "validation.answers.jsonl",
        "validation.losses.jsonl",
    ]
    for record in read_run_scores(folder).of("validation"):
        assert (record.run_id, record.adapter) == (result.run_id, result.files["adapter/adapter.json"])
        assert len(rows_of(folder, "validation", record.kind)) == record.rows == 12
        base = read_scores(folder.base_scores_file(record.base)).record
        assert (base.run_id, base.adapter, base.gain, base.rows) == ("", "", {}, 12)
        assert list(record.metrics) == list(record.gain) == list(base.metrics)
    assert result.adapter_bytes == sum(file.stat().st_size for file in folder.adapter.iterdir())
    assert not folder.checkpoints.exists()
    shown = capsys.readouterr().out
    assert f"% of LoRA r {result.arm.rank})" in shown
    assert str(folder.path) in shown


def test_answers_at_every_validation_give_curves_of_the_scores_and_change_nothing(tiny_config, finished_run):
    plain = folder_of(finished_run())
    without, rows_without = plain.record(), rows_of(plain, "validation")
    config = tiny_config("train.validation_answers=5", "force=true")
    with_answers = run.main(config)
    assert with_answers.run_id == without.run_id
    assert with_answers.files == without.files
    folder = folder_of(config)
    assert rows_of(folder, "validation") == rows_without
    rows = [row for row in read_metrics(folder.metrics_file) if "validation/loss" in row.values]
    assert [row.step for row in rows] == [0, 3, 6]
    first = rows_without[:5]
    for name in first[0].scores:
        mean = sum(float(row.scores[name]) for row in first) / 5
        assert rows[-1].values[f"validation/{name}"] == pytest.approx(mean)


def test_a_finished_run_is_printed_without_torch_or_its_generator(tiny_run, finished_run):
    # Digests of generated rows are in the cache from then on.
    run.main(finished_run())
    code = (
        "import runpy, sys\n"
        f"sys.argv = {['train.py', *tiny_run()]}\n"
        f"runpy.run_path({str(PROJECT / 'train.py')!r}, run_name='__main__')\n"
        "print(sorted({'torch', 'transformers', 'reasoning_gym', 'scipy'} & set(sys.modules)))"
    )
    done = processes.run_python("-c", code)
    assert "finished before" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_finished_run_is_printed_while_another_process_scores_it(finished_run, capsys, monkeypatch):
    def taken(_folder):
        raise Busy("another process is working on this run")

    config = finished_run()
    monkeypatch.setattr(RunFolder, "locked", taken)
    run.main(config)
    assert "finished before" in capsys.readouterr().out


def test_after_a_run_that_has_trained_three_commands_say_what_to_do_with_it(tiny_run, script):
    config = compose_config(tiny_run())
    folder = folder_of(config)
    code, out, err = script("train.py", *tiny_run())
    assert code == 0, err
    *_, ask, compare, use = out.splitlines()
    assert ask == f"  ask it                python scripts/generate.py {folder.path}"
    command, report = compare.removeprefix("  compare with LoRA     ").split(" && ")
    assert report == f"python scripts/report.py {config.outputs}"
    assert use == f"  use it in PEFT        python scripts/export.py {folder.path} --to peft"
    # The command changes nothing but the arm.
    assert run_id(compose_config(shlex.split(command)[2:])) == run_id(compose_config(tiny_run("tying=LoRA")))
    # A finished run is only printed.
    _, again, _ = script("train.py", *tiny_run())
    assert again.splitlines()[-1].startswith("  run folder")


def test_the_next_command_keeps_what_both_arms_share(tiny_config, tmp_path, monkeypatch):
    config = replace(tiny_config("tying=LoRA"), outputs=str(tmp_path / "out puts"))
    monkeypatch.chdir(tmp_path)
    words = ["tying=LoRA", "rank=r2", "train.lr=1e-3", "train.lr_factor.B=16", "train.steps=6", "force=true"]
    _, compare, _ = next_steps(config, Path(config.outputs) / "RUN", words).splitlines()
    command = "python train.py rank=r2 train.steps=6 tying=TABuv && python scripts/report.py 'out puts'"
    assert compare == f"  compare with TABuv    {command}"
    # Both arms adapt the same places, with the same dropout. The parts are the arm's own.
    words = ["tying=LoRA", "tying.targets=[q]", "+tying.layers=[0]", "tying.dropout=0.1", "tying.A.share=2"]
    _, compare, _ = next_steps(config, Path(config.outputs) / "RUN", words).splitlines()
    assert "train.py 'tying.targets=[q]' '+tying.layers=[0]' tying.dropout=0.1 tying=TABuv &&" in compare


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("VeraConfig", "use it in PEFT        X --to peft"),
        ("full", "export it             X --to merged"),
        ("Nola", "export it             X --to hub-card"),
    ],
)
def test_the_next_command_exports_what_the_method_has(tiny_config, monkeypatch, method, says):
    monkeypatch.setitem(other_methods.REGISTERED, "Nola", object())
    config = tiny_config()
    config = replace(config, tying=replace(config.tying, method=method))
    *_, export = next_steps(config, Path(config.outputs) / "RUN", []).splitlines()
    assert export.strip() == says.replace("X", f"python scripts/export.py {Path(config.outputs) / 'RUN'}")


def test_generated_rows_are_made_again_where_their_generator_changed(finished_run, monkeypatch):
    """The cache of digests is kept under the generator's version: another version may make other rows."""
    config = finished_run()
    digests = folder_of(config).record().data
    assert inputs.row_digests(config) == {split: data.digest for split, data in digests.items()}
    kept = list((Path(config.cache) / "digests").iterdir())
    assert len(kept) == 1
    inputs._ROWS.clear()
    monkeypatch.setattr(inputs.importlib.metadata, "version", lambda _package: "999")
    monkeypatch.setattr(Generated, "_worked_answer", lambda _self, _item: "#### 1")
    with pytest.raises(UserError, match="finished on other train data"):
        run.main(config)
    inputs._ROWS.clear()


def test_best_checkpoint_can_be_scored(tiny_config):
    config = tiny_config("score.checkpoint=best", "train.lr=0.5", "train.validate_every=1")
    result = run.main(config)
    losses = {
        row.step: row.values["validation/loss"]
        for row in read_metrics(folder_of(config).metrics_file)
        if "validation/loss" in row.values
    }
    best = min(losses, key=lambda step: (losses[step], step))
    assert result.training.scored_step == best


def test_only_the_best_adapters_that_a_checkpoint_may_come_back_to_are_kept(tiny_config):
    words = ("score.checkpoint=best", "train.validate_every=1", "train.checkpoint_every=1", "train.steps=8")
    config = tiny_config(*words, "train.lr=1e-3")
    run.main(replace(config, train=replace(config.train, pause_after=6)))
    folder = folder_of(config)
    losses = list(map(mean_loss, read_validation_losses(folder.validation_losses_file)))
    best = [min(range(step + 1), key=losses.__getitem__) for step in range(7)]
    kept = {best[int(path.name[-8:])] for path in folder.checkpoints.glob("step-*")}
    assert {int(path.name[-8:]) for path in folder.checkpoints.glob("best-*")} == kept
    assert len(kept) < len(set(best))
    finished = run.main(config)
    losses = list(map(mean_loss, read_validation_losses(folder.validation_losses_file)))
    assert finished.training.scored_step == min(range(9), key=losses.__getitem__)


def test_an_error_of_a_step_names_some_of_many_rows():
    """All of them would hide that the run has diverged: only the end of a long error is read."""
    examples = [SimpleNamespace(id=f"r{number}") for number in range(3000)]
    sampler = BatchSampler([1] * len(examples), TrainConfig(batch_size=2500), seed=0)
    own = SimpleNamespace(loaded=SimpleNamespace(train_examples=examples), sampler=sampler)
    said = trainer.Training._describe_rows(own, 1)
    assert said.startswith("training rows ['r")
    assert said.endswith("'] and 2484 more")
    assert len(said) < 300


def test_with_another_context_other_rows_fit(tiny_config):
    """Consecutive runs of one process share the token ids of their rows."""

    def rows(*more):
        loaded = loading.load(tiny_config("score.splits=[]", *more), ALONE)
        loaded.release()
        return loaded.rows["train"]

    every = rows()
    lengths = sorted(map(len, every.encoded))
    shorter = rows(f"model.context={lengths[len(lengths) // 2]}")
    assert shorter.kept == [
        number for number, row in zip(every.kept, every.encoded, strict=True) if len(row) <= lengths[len(lengths) // 2]
    ]
    assert 0 < len(shorter.kept) < len(every.kept) == 40


def test_with_another_dtype_it_is_another_base_model(tiny_config):
    """Consecutive runs of one process share the base model."""
    for dtype in ("float32", "bfloat16"):
        config = tiny_config(f"train.dtype={dtype}")
        assert loading.cached_base(config, torch.device("cpu")).model.dtype == getattr(torch, dtype)


class TestStoppedWhileScoring:
    """A process that was killed after a score and before its result has left the score."""

    @pytest.fixture
    def stopped(self, finished_run):
        """The folder, and the bytes of its files of scores."""
        folder = folder_of(finished_run("score.splits=[validation,test]", "score.metrics=null"))
        folder.result_file.unlink()
        files = {path: path.read_bytes() for path in sorted(folder.scores.iterdir())}
        assert len(files) == 4
        return folder, files

    def test_what_is_whole_and_of_this_adapter_and_these_rows_is_kept(self, stopped, tiny_config, monkeypatch):
        folder, files = stopped
        gone, other_adapter, cut, other_rows = files
        gone.unlink()
        for path, key in ((other_adapter, "adapter"), (other_rows, "digest")):
            value = getattr(read_score_record(path), key)
            path.write_bytes(files[path].replace(value.encode(), b"0" * 64, 1))
        cut.write_bytes(files[cut][:-10])
        scored, score_split = [], Scorer.score_split

        def spy(scorer, split, examples, out, wanted):
            scored.extend((split, kind) for kind in wanted.kinds)
            score_split(scorer, split, examples, out, wanted)

        monkeypatch.setattr(Scorer, "score_split", spy)
        config = tiny_config("score.splits=[validation,test]", "score.metrics=null")
        run.main(config)
        assert sorted(scored) == sorted(tuple(path.name.split(".")[:2]) for path in files)
        # They are the same again, and now nothing is scored.
        written = {path: path.stat().st_mtime_ns for path in files}
        scored.clear()
        folder.result_file.unlink()
        run.main(config)
        assert scored == []
        assert {path: path.stat().st_mtime_ns for path in files} == written
        read_run_scores(folder, folder.record())
        for path, before in files.items():
            assert path.read_bytes().split(b"\n")[1:] == before.split(b"\n")[1:], path

    def test_a_split_that_is_no_longer_asked_for_is_removed(self, stopped, tiny_config):
        """Its rows are not read, so they may have changed."""
        folder, _ = stopped
        run.main(tiny_config("score.splits=[validation]"))
        assert read_run_scores(folder).splits == ["validation"]


def test_a_run_that_another_process_finishes_while_this_one_loads_is_not_trained_again(
    tiny_config, finish, tmp_path, monkeypatch
):
    finished = finish(tiny_config(f"outputs={tmp_path}/other"))
    load = trainer.load

    def slow(*arguments):
        loaded = load(*arguments)
        shutil.copytree(tmp_path / "other", config.outputs)
        return loaded

    config = tiny_config()
    monkeypatch.setattr(trainer, "load", slow)
    monkeypatch.setattr(trainer, "begin", lambda *_: pytest.fail("trained again"))
    assert run.main(config) == finished
    assert folder_of(config).record() == finished


@pytest.fixture
def gsm8k(tiny_run, tmp_path):
    """Writes the lines of gsm8k's training file, and composes a run on it."""

    def composed(lines):
        write(tmp_path / "data", "gsm8k", *lines, split="train")
        more = ("task.validation_from_train=1", f"data_root={tmp_path}/data")
        return compose_config(tiny_run(*more, task="gsm8k"))

    return composed


def row(question: object, answer: int) -> bytes:
    return json.dumps({"question": f"What is {question}?", "answer": f"#### {answer}"}).encode()


def test_other_rows_are_an_error_not_a_match(gsm8k, tmp_path):
    rows = [row(i, i) for i in range(9)]
    config = gsm8k(rows)
    config.score.splits, config.score.metrics = ["test"], ["target_loss"]
    write(tmp_path / "data", "gsm8k", row(99, 99))
    run.main(config)
    write(tmp_path / "data", "gsm8k", row(98, 98))
    with pytest.raises(UserError, match="finished on other test data"):
        run.main(config)
    with pytest.raises(UserError, match=r"finished on other train data.*force=true"):
        run.main(gsm8k([*rows[:-1], row("changed", 0)]))


def test_a_command_that_waited_for_the_run_of_another_still_gets_the_scores_that_it_asks_for(tiny_config, monkeypatch):
    config, load = tiny_config("score.splits=[validation,test]", "score.metrics=[target_loss]"), trainer.load

    def late(*arguments):
        monkeypatch.setattr(trainer, "load", load)
        run.main(tiny_config("score.splits=[validation]", "score.metrics=[target_loss]"))
        return load(*arguments)

    monkeypatch.setattr(trainer, "load", late)
    run.main(config)
    assert rows_of(folder_of(config), "test", "losses")


def test_validation_rows_other_than_those_of_the_training_are_not_scored(gsm8k, tmp_path):
    config = gsm8k([row(i, i) for i in range(9)])
    config.score.splits = []
    run.main(config)
    write(tmp_path / "data", "gsm8k", *(row(i, i + 1) for i in range(9)), split="train")
    with pytest.raises(UserError, match="was trained beside other validation rows"):
        score_more(folder_of(config), splits=["validation"], data_root=str(tmp_path / "data"))


def test_a_training_row_among_the_validation_rows_stops_before_anything_is_written(gsm8k, tmp_path):
    """Two questions, each twice: whichever row is taken for validation, its prompt is also that of a training row."""
    with pytest.raises(UserError, match=r"task=\w+: 1 validation rows are also training rows \(such as id "):
        run.main(gsm8k([row(1, 1), row(2, 2), row(1, 1), row(2, 2)]))
    assert not (tmp_path / "outputs").exists()


def test_a_row_that_cannot_be_scored_stops_before_the_training(tiny_config):
    config = tiny_config("task.max_prompt_tokens=90")
    says = r"of validation has .* shortened to 90 \(task\.max_prompt_tokens=90\); raise task\.max_prompt_tokens$"
    with pytest.raises(UserError, match=says):
        run.main(config)
    # Without a limit of its own, the model's context is what applies.
    room = config.model.context - 90
    says = rf"cannot be shortened to 90 \(model\.context=\d+ less {room} for the answer\); lower task\.max_new"
    with pytest.raises(UserError, match=says):
        run.main(tiny_config(f"task.max_new_tokens={room}"))
    assert not folder_of(config).metrics_file.exists()


def test_a_run_is_not_scored_with_another_chat_template(tiny_config, tmp_path, monkeypatch):
    base = tiny("tiny_llama")
    base.tokenizer.chat_template = "U:{{ messages[0]['content'] }}A:"
    for part in (base.model, base.tokenizer):
        part.save_pretrained(tmp_path / "model")
    config = tiny_config("model.source=hub", f"model.path={tmp_path}/model", "task.chat_template=true")
    record = run.main(config)
    assert len(record.versions["chat template"]) == 16
    (tmp_path / "model" / "chat_template.jinja").write_text("<<{{ messages[0]['content'] }}>>")
    # As in another process, which has no model in memory.
    monkeypatch.setattr(loading, "_BASE", SingleSlotCache())
    with pytest.raises(UserError, match="was trained with another chat template of the model; restore it"):
        score_more(folder_of(config), splits=["test"])
