"""A run that is stopped while its output has no reader, while it loads, at its last step, or while it is scored."""

import os
import pty
import select
import signal
import subprocess
import sys

import pytest
from helpers import processes
from helpers.commands import wait_until
from helpers.tiny import folder_of, rows_of

from tiedlora.errors import STOP_MESSAGE, StoppedEarly, exit_codes
from tiedlora.models import device
from tiedlora.places import PROJECT
from tiedlora.records.rows import read_metrics
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run
from tiedlora.runs.trainer import Training
from tiedlora.scoring.split import Scorer
from tiedlora.training.signals import SIGNALS, StopSignal


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--multirun"]])
def test_a_ctrl_c_that_also_ends_the_reader_of_the_output_saves_a_checkpoint(tiny_run, tiny_config, words):
    """As in `python train.py ... 2>&1 | tee log`, where tee dies of the same Ctrl-C."""
    long = ["train.steps=100000", "train.checkpoint_every=100000", "train.validate_every=0", "train.log_every=1"]
    config = tiny_config(*long)
    folder = folder_of(config)
    command = [sys.executable, "train.py", *words, *tiny_run(*long)]
    with processes.started(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as started:
        wait_until(lambda: len(read_metrics(folder.metrics_file)) >= 3)
        started.stdout.close()
        started.send_signal(signal.SIGINT)
        assert started.wait(150) == 75
    assert folder.checkpoint_step() > 0
    assert not folder.error_file.exists()


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--multirun"]])
def test_a_closed_terminal_saves_a_checkpoint(tiny_run, tiny_config, words):
    long = ["train.steps=100000", "train.checkpoint_every=100000", "train.validate_every=0", "train.log_every=1"]
    folder = folder_of(tiny_config(*long))
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.chdir(PROJECT)
        os.execv(sys.executable, [sys.executable, "train.py", *words, *tiny_run(*long)])

    def trains():
        while select.select([terminal], [], [], 0)[0]:
            os.read(terminal, 65536)
        return len(read_metrics(folder.metrics_file)) >= 3

    try:
        wait_until(trains)
    finally:
        os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    assert folder.checkpoint_step() > 0
    assert not folder.error_file.exists()


MOMENTS = {  # what train.py is doing -> Python that makes a signal come then
    "importing": """
class Finder:
    def find_spec(name, *_):
        if name == "hydra":
            send()
sys.meta_path.insert(0, Finder)
""",
    "loading": "from tiedlora.runs import loading; loading.cached_base = send",
    "leaving a destructor": """
class Late:
    __del__ = send
def load(*_):
    Late()
    time.sleep(60)
from tiedlora.runs import loading; loading.cached_base = load
""",
    "printing a finished run": "from tiedlora.runs import run; run.terminal_lines = send",
}


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        *(("importing", number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)),
        ("printing a finished run", signal.SIGUSR1),
        *(pytest.param(when, signal.SIGTERM, marks=pytest.mark.slow) for when in ("loading", "leaving a destructor")),
    ],
)
def test_a_signal_outside_training_ends_with_the_code_of_a_stop(tiny_run, tiny_config, finish, moment, number):
    """A script of Slurm that asks for 75 must also start a run again that was stopped in its first second."""
    if moment == "printing a finished run":
        finish(tiny_config())
    program = (
        "import os, runpy, sys, time\n"
        f"def send(*_): os.kill(os.getpid(), {int(number)})\n"
        f"{MOMENTS[moment]}\n"
        "sys.argv[0] = 'train.py'\n"
        "runpy.run_path('train.py', run_name='__main__')"
    )
    ended = processes.run_python("-c", program, *tiny_run(), cwd=PROJECT)
    assert ended.returncode == 75, ended.stderr
    assert ended.stderr.splitlines()[-1] == STOP_MESSAGE
    assert "Traceback" not in ended.stderr
    assert "ignored" not in ended.stderr


@pytest.fixture
def usr2_and_term():
    """The two signals' numbers. Afterwards they have their handlers again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    yield list(before)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_all_handlers_of_a_steps_signals_are_called_and_no_stream_is_written_to(usr2_and_term, monkeypatch, capfd):
    """submitit's handler of USR2 puts the job into the queue again, and that of SIGTERM does nothing."""

    class Busy:
        """A stream that is being written to when the signal comes."""

        def write(self, _text):
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    called, stop = [], StopSignal()
    for number in usr2_and_term:
        signal.signal(number, lambda number, _: called.append(number))
    monkeypatch.setattr(sys, "stderr", Busy())
    with stop:
        stop.finish_step_first = True
        # The last one is that of a closed terminal, unless nohup ignores it.
        for number in (*usr2_and_term, *SIGNALS[4:]):
            signal.raise_signal(number)
        assert stop.requested()
    assert called == usr2_and_term
    assert capfd.readouterr().err.count("saving a checkpoint after this step") == 2 + len(SIGNALS[4:])


@pytest.mark.usefixtures("usr2_and_term")
def test_a_job_that_may_not_be_queued_again_is_no_failed_run():
    def refuse(*_):
        raise RuntimeError("Job not requeued because: timed-out too many times.")

    stop = StopSignal()
    stop.finish_step_first = True
    signal.signal(signal.SIGUSR2, refuse)
    with pytest.raises(KeyboardInterrupt, match="timed-out too many times"), stop:
        signal.raise_signal(signal.SIGUSR2)


def test_a_signal_during_the_last_validation_stops_before_the_scoring(tiny_config, finish, tmp_path, monkeypatch):
    """Slurm waits for two minutes only, and the scoring may take longer."""
    finish(tiny_config(f"outputs={tmp_path}/plain"))
    config = tiny_config()
    folder, validate = folder_of(config), Training._validate

    def signalled(training):
        if training.state.step == config.train.steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(training)

    monkeypatch.setattr(Training, "_validate", signalled)
    monkeypatch.setattr(device, "peak_memory_bytes", lambda _: 2**50)
    with pytest.raises(StoppedEarly):
        run.main(config)
    assert folder.state() == "interrupted"
    assert folder.checkpoint_step() == config.train.steps
    monkeypatch.undo()
    run.main(config)
    plain = RunFolder(tmp_path / "plain" / folder.path.name)
    record = folder.finished_record()
    assert record.files == plain.finished_record().files
    assert record.training.peak_memory_bytes == 2**50, "that of the process that trained"
    steps = [row.step for row in read_metrics(folder.metrics_file)]
    assert steps == [row.step for row in read_metrics(plain.metrics_file)]


def test_a_signal_while_a_finished_run_is_scored_ends_as_a_stop(tiny_config, finish, monkeypatch):
    finish(tiny_config("score.splits=[]"))
    monkeypatch.setattr(Scorer, "score_split", lambda *_, **__: os.kill(os.getpid(), signal.SIGUSR2))
    with pytest.raises(SystemExit) as end, exit_codes():
        run.main(tiny_config("score.splits=[validation]"))
    assert end.value.code == 75
    monkeypatch.undo()
    config = tiny_config("score.splits=[validation]")
    run.main(config)
    assert rows_of(folder_of(config), "validation")
