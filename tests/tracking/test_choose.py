"""tracking=auto: W&B where this machine has a key, and otherwise none, without a question to any server."""

import logging
import socket

import pytest

from tiedlora.runs import run
from tiedlora.tracking import run_trackers


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any look-up of a name, and any connection, is an error."""
    for owner, name in ((socket, "getaddrinfo"), (socket, "create_connection"), (socket.socket, "connect")):
        monkeypatch.setattr(owner, name, lambda *asked, **_: pytest.fail(f"the network was asked: {asked}"))
    run_trackers._chosen.cache_clear()
    yield
    run_trackers._chosen.cache_clear()


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A home without keys, where W&B may be online."""
    for name in ("WANDB_MODE", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("home")
def test_without_a_key_there_is_no_tracker_and_what_the_user_says_decides(tiny_config, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, "tiedlora"):
        assert [run_trackers.backend_of(tiny_config()) for _ in range(3)] == ["none"] * 3
    assert [record.message for record in caplog.records if "tracking" in record.message] == [
        "tracking: only metrics.jsonl, because this machine is not logged in to W&B (`wandb login`)"
    ]
    assert run_trackers.backend_of(tiny_config("tracking=wandb")) == "wandb"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    run_trackers._chosen.cache_clear()
    assert run_trackers.backend_of(tiny_config()) == "wandb"
    assert run_trackers.backend_of(tiny_config("tracking=none")) == "none"


def test_a_key_in_the_environment_or_in_netrc_is_a_login(home, monkeypatch):
    netrc = home / ".netrc"
    netrc.touch(0o600)
    for host, is_found in (("example.org", False), ("api.wandb.ai", True)):
        netrc.write_text(f"machine {host} login user password {'x' * 40}\n")
        assert run_trackers.is_logged_in() == is_found
    # The key of another server is none for this one.
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not run_trackers.is_logged_in()
    netrc.write_text(f"machine wandb.example.org login user password {'x' * 40}\n")
    assert run_trackers.is_logged_in()
    # W&B writes the port of a server into the file.
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:8080")
    assert not run_trackers.is_logged_in()
    netrc.write_text(f"machine localhost:8080\n  login user\n  password {'x' * 40}\n")
    assert run_trackers.is_logged_in()
    netrc.rename(home / "_netrc")
    assert run_trackers.is_logged_in()
    monkeypatch.setenv("NETRC", "~/_netrc")
    assert run_trackers.is_logged_in()
    monkeypatch.setenv("NETRC", "~/missing")
    assert not run_trackers.is_logged_in()
    monkeypatch.delenv("NETRC")
    netrc.write_text(f"machine wandb.example.org login user password {'x' * 40}\n")
    monkeypatch.delenv("WANDB_BASE_URL")
    settings = home / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert run_trackers.is_logged_in()
    for damaged in (b"machine\n\x00 not a netrc", b"\xff\xfe\x81"):
        netrc.write_bytes(damaged)
        assert not run_trackers.is_logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert run_trackers.is_logged_in()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert not run_trackers.is_logged_in()


def test_a_run_on_a_machine_without_an_account_asks_no_server(home, tiny_config):
    record = run.main(tiny_config("train.steps=2"))
    assert record is not None
    assert not list(home.rglob("*wandb*"))
