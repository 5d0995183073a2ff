"""The helper that starts processes for the tests: no test waits for ever, and none leaves a process behind."""

import signal
import sys

import psutil
from helpers import processes
from helpers.commands import FreshCommand, wait_until

STOPPED_CHILD = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session={session})
os.kill(child.pid, signal.SIGSTOP)
print(child.pid, flush=True)
if {waits}:
    child.wait()
"""


def has_ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_stopped_child_that_holds_the_output_keeps_nobody_waiting():
    done = processes.run_python("-c", STOPPED_CHILD.format(session=False, waits=False))
    assert done.returncode == 0, done.stderr
    wait_until(lambda: has_ended(int(done.stdout)), seconds=20)


def test_a_process_that_takes_too_long_ends_with_its_whole_family():
    done = processes.run_python("-c", STOPPED_CHILD.format(session=True, waits=True), seconds=3)
    assert done.returncode == -signal.SIGKILL
    wait_until(lambda: has_ended(int(done.stdout)), seconds=20)


def test_a_command_that_its_test_has_left_is_ended():
    command = FreshCommand("plan", "+grid=quick", script="scripts/sweep.py")
    processes.end_all()
    assert command.ended().code == -signal.SIGKILL
    assert not processes.STARTED


def test_a_context_ends_its_process():
    with processes.started([sys.executable, "-c", "import time; time.sleep(1000)"]) as process:
        pass
    assert process.returncode == -signal.SIGKILL
