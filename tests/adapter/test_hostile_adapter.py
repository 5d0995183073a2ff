"""Malformed adapter files: a table of files with their messages, and a search for more."""

import dataclasses
import hashlib
import json
import os
import pickle
import struct

import pytest
import torch
from helpers.hostile import ODD_VALUES, refused, right_or_refused, search, snapshot
from helpers.tiny import model_option, tiny, tying_option
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as load_bytes
from safetensors.torch import save

import tiedlora
from tiedlora.adapter import attach, attach_adapter, load
from tiedlora.adapter import save as save_adapter
from tiedlora.models.base_model import load_base


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The contents of the two files of an adapter's folder that is never changed."""
    folder = tmp_path_factory.mktemp("whole") / "adapter"
    base = tiny("tiny_llama")
    save_adapter(attach(base.model, tying_option("TABuv"), 4).adapter, folder, base.record)
    return json.loads((folder / "adapter.json").read_text()), (folder / "adapter.safetensors").read_bytes()


def write(folder, description, data: bytes, *, sign: bool = True):
    """Write the two files, with the correct checksum of the tensors, except if the checksum is the error."""
    folder.mkdir(exist_ok=True)
    if sign:
        description = {**description, "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "adapter.safetensors").write_bytes(data)
    text = description if isinstance(description, bytes) else json.dumps(description).encode()
    (folder / "adapter.json").write_bytes(text)
    return folder


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


def changed(**tensors):
    """The file with other tensors; None takes one away."""
    return lambda data: save({name: part for name, part in {**load_bytes(data), **tensors}.items() if part is not None})


TENSORS = {  # the changed adapter.safetensors, and words of the message
    "cut in the values": (lambda data: data[:-4], "is not a readable safetensors file"),
    "a header as long as memory": (lambda data: struct.pack("<Q", 2**62) + data[8:], "is not a readable"),
    "a pickle": (lambda _data: pickle.dumps({"qkv.A": Evil()}), "is not a readable safetensors file"),
    "another shape": (changed(**{"qkv.u": torch.ones(3, 5)}), "(3, 5), expected torch.float32 (3, 4)"),
    "half precision": (changed(**{"qkv.u": torch.ones(3, 4).half()}), "qkv.u is torch.float16 (3, 4), expected"),
    "a missing part": (changed(**{"qkv.u": None}), "qkv.u is missing, expected torch.float32 (3, 4)"),
    "an extra part": (changed(**{"qkv.evil": torch.ones(1)}), "qkv.evil is torch.float32 (1,), expected no part"),
    "a value that is none": (changed(**{"qkv.u": torch.full((3, 4), float("nan"))}), "qkv.u holds values that are not"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_wrong_tensors_are_named(what, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    description, data = whole
    make, says = TENSORS[what]
    write(tmp_path / "adapter", description, make(data))
    with refused(says, tmp_path):
        load(tmp_path / "adapter")
    assert not (tmp_path / "owned").exists()


DESCRIPTIONS = {  # the changed values of adapter.json, and words of the message
    "another format": ({"format": 2}, "format 2 is not 1, which this version reads for standard scaling"),
    "another scaling": ({"scaling": "other", "format": 2}, "scaling=other: choose one of standard, rslora"),
    "a huge rank": ({"rank": 10**12}, "rank=1000000000000: must be an int from 1"),
    "infinite alpha": ({"alpha": float("inf")}, "'alpha' is inf, which cannot be"),
    "an unknown key": ({"tying": {"evil": 1}}, "'tying.evil' is 1"),
    "a huge hidden size": (
        {"architecture": {"layers": 3, "hidden": 10**12}},
        "'architecture.hidden' is 1000000000000, which cannot be a value of an adapter's description: must be less",
    ),
    "parts that are larger than memory": (
        {"rank": 2**16, "architecture": {"layers": 3, "hidden": 10**6, "heads": 4, "kv_heads": 2, "head_dim": 8}},
        "expected torch.float32",
    ),
    "a base without a name": ({"base": {}}, "has no 'base.name', so it is not an adapter's description"),
    "a checksum of others": ({"sha256": "0"}, "is damaged or was changed"),
}


@pytest.mark.parametrize("what", DESCRIPTIONS)
def test_wrong_descriptions_are_named(what, whole, tmp_path):
    description, data = whole
    changes, says = DESCRIPTIONS[what]
    write(tmp_path / "adapter", {**description, **changes}, data, sign="sha256" not in changes)
    with refused(says, tmp_path):
        load(tmp_path / "adapter")


def test_what_is_no_folder_or_file(whole, tmp_path):
    description, data = whole
    model = tiny("tiny_llama").model
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for source in ("empty", "loop", "a\0b", "x" * 5000, "~nobody-here/x"):
        with refused("is neither a finished run nor an adapter's folder"):
            tiedlora.load(tmp_path / source if source[0] != "~" else source, model)
    folder = write(tmp_path / "adapter", description, data)
    (folder / "adapter.safetensors").unlink()
    with refused("adapter.safetensors: is missing"):
        load(folder)
    os.mkfifo(folder / "adapter.safetensors")
    with refused("adapter.safetensors: is not a regular file"):
        load(folder)


def test_an_adapter_of_another_model(whole, tmp_path):
    description, data = whole
    folder = write(tmp_path / "adapter", description, data)
    with refused("the adapter is for a model with family=llama, this model has family=gpt2", tmp_path):
        tiedlora.load(folder, tiny("tiny_gpt2").model)
    deeper = tiny("tiny_llama").model
    deeper.config.num_hidden_layers = 5
    with refused("layers=3, this model has layers=5"):
        attach_adapter(deeper, load(folder)[0])


MODELS = {  # files of a base model's folder, and words of the message
    "a pickle for weights": ({"config.json": b"{}", "pytorch_model.bin": pickle.dumps(Evil())}, "must be a folder"),
    "code of its own": (
        {
            "config.json": b'{"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}',
            "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["evil.T", null]}}',
            "evil.py": b"open('owned', 'w')\n",
            "model.safetensors": save({"x": torch.ones(1)}),
        },
        "cannot be loaded",
    ),
}


@pytest.mark.parametrize("what", MODELS)
def test_a_base_model_that_is_none_runs_no_code(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files, says = MODELS[what]
    (tmp_path / "model").mkdir()
    for name, data in files.items():
        (tmp_path / "model" / name).write_bytes(data)
    config = dataclasses.replace(model_option("tiny_llama"), source="hub", path=str(tmp_path / "model"))
    with refused(says, tmp_path):
        load_base(config, "float32", torch.device("cpu"), tmp_path / "cache")
    assert not (tmp_path / "owned").exists()


@given(st.data())
@search(60)
def test_any_description_loads_or_is_refused(whole, tmp_path_factory, data):
    description, tensors = whole
    description = json.loads(json.dumps(description))
    for _ in range(data.draw(st.integers(1, 2))):
        node = description
        while isinstance(node, dict) and node:
            key = data.draw(st.sampled_from(sorted(node)))
            if not isinstance(node[key], dict) or data.draw(st.booleans()):
                node[key] = data.draw(ODD_VALUES)
                break
            node = node[key]
    folder = write(tmp_path_factory.getbasetemp() / "any-adapter", description, tensors)
    before = snapshot(folder)
    with right_or_refused():
        adapter, _ = load(folder)
        attach_adapter(tiny("tiny_llama").model, adapter)
    assert snapshot(folder) == before
