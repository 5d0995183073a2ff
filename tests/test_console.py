"""The console command `tiedlora`: its help, its messages, and that files and commands are the same functions."""

import ast
import importlib
import os
import re
import subprocess
import sys

import pytest

import tiedlora
from tiedlora import __main__ as console
from tiedlora.errors import MISTAKE
from tiedlora.places import PROJECT

SECONDS = 0.5
"""So soon the help answers. It is measured as time of the processor, because the machine may be busy."""


@pytest.fixture
def called(monkeypatch, capsys):
    """Call `tiedlora WORDS` in this process. Returns (exit code, standard output, standard error)."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["/usr/bin/tiedlora", *words])
        code = 0
        try:
            console.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


def test_help_answers_at_once_and_without_torch_or_hydra():
    code = (
        "import runpy, sys; sys.argv = ['tiedlora', '--help']\n"
        "try: runpy.run_module('tiedlora', run_name='__main__')\n"
        "finally: print(sorted({'torch', 'transformers', 'hydra', 'omegaconf', 'numpy'} & set(sys.modules)))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert (process.returncode, out.splitlines()[-1]) == (0, "[]")
    assert used.ru_utime + used.ru_stime < SECONDS


def test_help_has_a_line_and_an_example_for_each_command(called):
    code, out, _ = called("--help")
    assert code == 0
    for name in console.COMMANDS:
        assert re.search(rf"^  {name} +\w.*\n +tiedlora {name} \S", out, re.MULTILINE), name
    assert called() == (MISTAKE, out, "")
    assert max(map(len, out.splitlines())) <= 100


def test_every_command_is_a_module_and_the_file_of_its_name_starts_the_same_function():
    modules = {path.stem for path in (PROJECT / "src/tiedlora/commands").glob("*.py")} - {"__init__", "parser"}
    assert modules == set(console.COMMANDS)
    files = {"train": PROJECT / "train.py", **{path.stem: path for path in (PROJECT / "scripts").glob("*.py")}}
    # `make gpu` has a file of its own.
    assert set(files) == modules - {"gpu"}
    for name, path in files.items():
        assert callable(importlib.import_module(f"tiedlora.commands.{name}").main)
        assert f'start("{name}", sys.argv[1:])' in ast.unparse(ast.parse(path.read_text())).replace("'", '"')


def test_an_unknown_command_is_one_line_with_the_nearest(called):
    code, out, err = called("repot", "outputs")
    assert (code, out) == (MISTAKE, "")
    assert err == "error: 'repot': no such command (did you mean report?); `tiedlora --help` shows all commands\n"


def test_the_version_has_one_place(called):
    assert called("--version") == (0, f"tiedlora {tiedlora.__version__}\n", "")
    changelog = (PROJECT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## \[([\d.]+)\]", changelog, re.MULTILINE)[0] == tiedlora.__version__
    assert f"\nversion: {tiedlora.__version__}\n" in (PROJECT / "CITATION.cff").read_text()


def test_help_and_messages_name_commands_as_this_one_was_called(called, script, tmp_path, monkeypatch):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.yaml").write_text(
        "name: study\nwords: []\nparts: [{name: a, words: [], sweeps: [[]]}]\n"
    )
    monkeypatch.chdir(tmp_path)
    helps = [called("verify", "--help")[1], script("scripts/verify.py", "--help")[1]]
    errors = [called("report", "study")[2], script("scripts/report.py", "study")[2]]
    for text, usage, other in zip(helps, ("tiedlora verify", "verify.py"), ("tiedlora train", "train.py"), strict=True):
        assert text.startswith(f"usage: {usage} [-h]")
        assert f"as data_root= of {other}" in " ".join(text.split())
    assert "; tiedlora study run study makes them" in errors[0]
    assert "; scripts/study.py run study makes them" in errors[1]


def test_a_launcher_of_processes_gets_a_module_and_a_persons_file_keeps_its_name(monkeypatch):
    text = "my/train.py: start torchrun --nproc-per-node N train.py ..., or `python train.py --cfg job`"
    monkeypatch.setattr(sys, "argv", ["tiedlora train"])
    assert console.errors.as_called(text) == (
        "my/train.py: start torchrun --nproc-per-node N -m tiedlora train ..., or `tiedlora train --cfg job`"
    )


def test_a_shell_completes_the_words_of_train_py_and_not_of_the_command(called, script, monkeypatch):
    monkeypatch.setenv("COMP_LINE", "python train.py tying=LoRA_q")
    assert script("train.py", "-sc", "query=bash") == (0, "tying=LoRA_qkv\n", "")
    _, _, err = called("train", "-sc", "install=bash")
    assert err == "error: -sc: is for `python ./train.py` in a checkout only; leave it out\n"


def test_measurements_on_a_gpu_need_a_checkout(called, monkeypatch):
    monkeypatch.setattr("tiedlora.commands.gpu.PROJECT", None)
    code, out, err = called("gpu")
    assert (code, out) == (MISTAKE, "")
    assert "is an installed package; clone it" in err
