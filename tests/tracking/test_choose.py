"""tracking=auto: W&B where this machine has a key, and otherwise none, without a question to any server."""

import logging
import socket

import pytest

from tiedlora.config.compose import compose_config
from tiedlora.config.identity import run_id
from tiedlora.runs import run
from tiedlora.tracking import run_trackers


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any look-up of a name, and any connection, is an error."""

    def refuse(*arguments, **options):
        raise AssertionError(f"the network was asked: {arguments}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    run_trackers._say.cache_clear()
    yield
    run_trackers._say.cache_clear()


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A home without keys, where W&B may be online."""
    for name in ("WANDB_MODE", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_auto_is_the_default_and_changes_no_id(tiny_run):
    default = compose_config(tiny_run())
    assert default.tracking.backend == "auto"
    assert {
        run_id(compose_config(tiny_run(f"tracking={name}"))) for name in ("none", "wandb", "trackio", "mlflow")
    } == {run_id(default)}


def test_without_a_key_there_is_no_tracker(home, tiny_config, caplog):
    with caplog.at_level(logging.INFO, "tiedlora"):
        assert [run_trackers.backend_of(tiny_config()) for _ in range(3)] == ["none"] * 3
    assert [record.message for record in caplog.records if "tracking" in record.message] == [
        "tracking: only metrics.jsonl, because this machine is not logged in to W&B (`wandb login`)"
    ]


def test_a_key_in_the_environment_or_in_netrc_chooses_wandb(home, monkeypatch, tiny_config):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert run_trackers.backend_of(tiny_config()) == "wandb"
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = home / ".netrc"
    netrc.write_text("machine example.org login user password secret\n")
    netrc.chmod(0o600)
    assert run_trackers.backend_of(tiny_config()) == "none"
    netrc.write_text(f"machine api.wandb.ai login user password {'x' * 40}\n")
    assert run_trackers.backend_of(tiny_config()) == "wandb"
    # The key of another server is none for this one.
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert run_trackers.backend_of(tiny_config()) == "none"
    netrc.write_text(f"machine wandb.example.org login user password {'x' * 40}\n")
    assert run_trackers.backend_of(tiny_config()) == "wandb"
    monkeypatch.delenv("WANDB_BASE_URL")
    settings = home / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert run_trackers.backend_of(tiny_config()) == "wandb"
    netrc.write_text("machine\n\x00 not a netrc")
    assert run_trackers.backend_of(tiny_config()) == "none"
    assert run_trackers.backend_of(tiny_config("tracking=wandb")) == "wandb", "what the user says decides"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert run_trackers.backend_of(tiny_config("tracking=none")) == "none"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert run_trackers.backend_of(tiny_config()) == "none"


def test_a_run_on_a_machine_without_an_account_asks_no_server(home, tiny_config):
    record = run.main(tiny_config("train.steps=2"))
    assert record is not None
    assert not list(home.rglob("*wandb*"))
