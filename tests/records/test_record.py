"""Identity is meaning: eleven frozen ids, and what may and may not change them."""

import errno
from dataclasses import field, make_dataclass

import pytest
from helpers.report_runs import scored_run

from tiedlora.config import compose as configuration
from tiedlora.config.identity import run_id
from tiedlora.config.schema import Config, TrainConfig
from tiedlora.errors import UserError
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_finished
from tiedlora.records.summary import terminal_lines

# An id that changes here re-runs everybody's sweeps. Change one only with a reason in the commit message.
FROZEN = {
    "": "TABuv-r8-chain_sum-smollm2_135m_instruct_q4_1-s0-831449f583",
    # The rate that it suggested until December 2026. (conf/rates.yaml has another one for r 1.)
    "tying=LoRA rank=r1 train.lr=3e-3": "LoRA-r1-chain_sum-smollm2_135m_instruct_q4_1-s0-e7b1be0b2e",
    "tying=LoRA_qkv seed=1": "LoRA_qkv-r8-chain_sum-smollm2_135m_instruct_q4_1-s1-717f0365ed",
    "tying=Tuv task=gsm8k train=paper model=llama2_7b": "Tuv-r8-gsm8k-llama_2_7b_hf-s0-0a8ae558fb",
    "tying=TA task=squad rank=r2": "TA-r2-squad-smollm2_135m_instruct_q4_1-s0-1766098e69",
    "tying=TABuv task=dialogsum model=gpt2_xl rank=r32": "TABuv-r32-dialogsum-gpt2_xl-s0-8a26e28b17",
    "tying=TAuv task=hellaswag train.lr=1e-3": "TAuv-r8-hellaswag-smollm2_135m_instruct_q4_1-s0-c0e19bb0e3",
    "tying=TBuv task=iwslt2017 score.checkpoint=best": "TBuv-r8-iwslt2017-smollm2_135m_instruct_q4_1-s0-15f9dbf13a",
    "tying=TAB tying.A.share=4 rank.alpha=16": "custom-r8-chain_sum-smollm2_135m_instruct_q4_1-s0-e58127478a",
    "tying=TB task=gsm_symbolic train=tiny model=tiny_gpt2": "TB-r8-gsm_symbolic-gpt2-s0-7a1774390d",
    # The start that TABuv had until December 2026: its values keep their hash.
    "tying=TABuv_b0": "TABuv_b0-r8-chain_sum-smollm2_135m_instruct_q4_1-s0-5419d77e8d",
}


def id_of(*overrides):
    return run_id(configuration.compose_config(list(overrides)))


@pytest.mark.parametrize(("overrides", "expected"), FROZEN.items())
def test_the_ids_of_these_runs_never_change(overrides, expected):
    assert id_of(*overrides.split()) == expected


@pytest.mark.parametrize(
    ("written", "otherwise"),
    [
        ([], ["rank=r8", "tying=TABuv", "model=smollm2_135m"]),
        (["rank=r2", "seed=1"], ["seed=1", "rank.r=2"]),
        ([], ["rank.alpha=8"]),
        ([], ["train.lr=1e-2"]),
        (["tying=TABuv_b0"], ["tying=TAB", "tying.u.trained=true", "tying.v.trained=true", "tying.name=mine"]),
        (["tying=LoRA_l15", "train.lr=1e-2"], ["tying=LoRA", "tying.layers=[evenly 15]", "train.lr=1e-2"]),
        ([], ["train.microbatch_size=2", "train.device=cpu", "train.threads=1", "train.log_every=1"]),
        ([], ["outputs=elsewhere", "cache=there", "data_root=here", "force=true", "tracking=wandb"]),
        ([], ["score.splits=[validation,test]", "train.checkpoint_every=7", "model=smollm2_135m", "model.path=folder"]),
        ([], ["task.folder=other", "task.hub.id=another/copy"]),
        ([], ["objective=targets", "score.metrics=[target_loss]"]),
        ([], ["tying.u.init=1", "rank.scaling=standard", "tying.layers=[0-29]"]),
        (["tying.layers=[0,1,2,9]"], ["tying.layers=[9,0-2,1]"]),
        (["tying=TABuv_b0"], ["tying.v.init=1", "tying.B.init=0"]),
    ],
)
def test_the_same_meaning_is_the_same_run(written, otherwise):
    assert id_of(*written) == id_of(*otherwise)


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "rank.alpha=16",
        "rank.scaling=rslora",
        "train.lr=2e-2",
        "train.weight_decay=0.1",
        "tying.u.init=0.1",
        "tying.dropout=0.1",
        "tying.layers=[0-28]",
        "task.version=2",
        "task.rows.train=100",
        "score.checkpoint=best",
        "model.revision=abc",
        "objective=reward",
    ],
)
def test_another_meaning_is_another_run(change):
    assert id_of(change) != id_of()


def test_a_new_neutral_key_changes_no_id_and_a_changed_default_does():
    config = configuration.compose_config([])

    def with_field(name, default, value, neutral=True):
        metadata = {"neutral": default} if neutral else {}
        grown = make_dataclass(
            "Grown", [(name, float, field(default=default, metadata=metadata))], bases=(TrainConfig,)
        )
        train = grown(**{**vars(config.train), name: value})
        return Config(**{**vars(config), "train": train})

    before = run_id(config)
    assert run_id(with_field("label_smoothing", 0.0, 0.0)) == before
    assert run_id(with_field("label_smoothing", 0.0, 0.1)) != before
    assert run_id(with_field("label_smoothing", 0.0, 0.0, neutral=False)) != before
    config.train.eps = 1e-7
    assert run_id(config) != before


class TestFolder:
    def test_states_come_from_what_is_there(self, tmp_path, monkeypatch):
        folder = RunFolder(tmp_path / "run")
        assert folder.state() == "missing"
        assert not folder.path.exists()
        with folder.locked():
            pass
        assert folder.state() == "interrupted"
        try:
            raise ValueError("boom")
        except ValueError:
            folder.write_error()
        assert folder.state() == "failed"
        assert "boom" in folder.error_file.read_text()
        folder.result_file.write_text("{}")
        assert folder.state() == "done"
        # A run that starts again and is killed while its files are removed is not done.
        monkeypatch.setattr("tiedlora.records.run_folder._remove", lambda _entry: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            folder.clear()
        assert folder.state() == "failed"

    def test_a_file_system_without_locks_is_refused(self, tmp_path, monkeypatch):
        """A file that stands for a lock would stay after a kill, and the run could never go on."""

        def no_flock(*_):
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr("fcntl.flock", no_flock)
        folder = RunFolder(tmp_path / "run")
        with pytest.raises(UserError, match=r"run/\.lock: the file system has no locks \(flock\)"), folder.locked():
            pass


@pytest.mark.parametrize(
    ("right", "base_right", "says"),
    [
        (40, 0, None),
        (20, 20, "no gain shown, the interval includes 0"),
        (0, 40, "worse than the base"),
        (1, 0, "near zero for this model, so it cannot tell methods apart"),
    ],
)
def test_the_end_of_a_run_says_where_there_is_no_gain(right, base_right, says, tmp_path):
    answers = ([1.0] * count + [0.0] * (200 - count) for count in (right, base_right))
    run = read_finished(RunFolder(scored_run(tmp_path, *answers)))
    lines = terminal_lines(run.record, run.scores, tmp_path).splitlines()
    assert [line.strip() for line in lines if ": " in line][1:] == (
        [] if says is None else [f"exact_match_strict: {says}"]
    )
