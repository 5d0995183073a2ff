"""Malformed adapter files: a table of files with their messages, and a search for more."""

import dataclasses
import hashlib
import json
import os
import pickle
import struct
import tracemalloc

import pytest
import torch
from helpers.hostile import ODD_VALUES, refused, right_or_refused, search, snapshot
from helpers.tiny import model_option, tiny, tying_option
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

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
    def make(data: bytes, path) -> bytes:
        path.write_bytes(data)
        return save({**load_file(path), **tensors})

    return make


TENSORS = {  # the changed adapter.safetensors, and words of the message
    "empty": (lambda data, _: b"", "is not a readable safetensors file"),
    "cut in the header": (lambda data, _: data[:40], "is not a readable safetensors file"),
    "cut in the values": (lambda data, _: data[:-4], "is not a readable safetensors file"),
    "a header as long as memory": (lambda data, _: struct.pack("<Q", 2**62) + data[8:], "is not a readable"),
    "a header longer than the file": (lambda data, _: struct.pack("<Q", 10**6) + data[8:], "is not a readable"),
    "no header": (lambda data, _: struct.pack("<Q", 0) + data[8:], "is not a readable safetensors file"),
    "values beyond the end": (lambda data, _: data + b"\0" * 64, "is not a readable safetensors file"),
    "random bytes": (lambda data, _: bytes(range(256)) * 8, "is not a readable safetensors file"),
    "a pickle": (lambda data, _: pickle.dumps({"qkv.A": Evil()}), "is not a readable safetensors file"),
    "a web page": (lambda data, _: b"<html><script>alert(1)</script></html>", "is not a readable safetensors file"),
    "a part of another shape": (changed(**{"qkv.u": torch.ones(3, 5)}), "qkv.u is F32 (3, 5), expected F32 (3, 4)"),
    "a part without a dimension": (changed(**{"qkv.u": torch.ones(12)}), "qkv.u is F32 (12,), expected"),
    "half precision": (changed(**{"qkv.u": torch.ones(3, 4).half()}), "qkv.u is F16 (3, 4), expected F32"),
    "whole numbers": (changed(**{"qkv.u": torch.ones(3, 4).int()}), "qkv.u is I32 (3, 4), expected F32"),
    "an extra part": (changed(**{"qkv.evil": torch.ones(1)}), "lacks nothing and has ['qkv.evil'] beyond its parts"),
    "a value that is none": (changed(**{"qkv.u": torch.full((3, 4), float("nan"))}), "qkv.u holds values that are not"),
    "an infinite value": (
        changed(**{"qkv.B": torch.full((1, 64, 4), float("inf"))}),
        "qkv.B holds values that are not",
    ),
}


@pytest.mark.parametrize("what", TENSORS)
def test_wrong_tensors_are_named(what, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    description, data = whole
    make, says = TENSORS[what]
    write(tmp_path / "adapter", description, make(data, tmp_path / "scratch"))
    with refused(says, tmp_path):
        load(tmp_path / "adapter")
    assert not (tmp_path / "owned").exists()


def test_a_missing_part_and_another_checksum(whole, tmp_path):
    description, data = whole
    (tmp_path / "scratch").write_bytes(data)
    tensors = load_file(tmp_path / "scratch")
    del tensors["qkv.u"]
    write(tmp_path / "adapter", description, save(tensors))
    with refused("lacks ['qkv.u'] and has nothing beyond its parts"):
        load(tmp_path / "adapter")
    write(tmp_path / "adapter", description, data[:-1] + b"\1", sign=False)
    with refused("is damaged or was changed", tmp_path):
        load(tmp_path / "adapter")


DESCRIPTIONS = {  # the changed values of adapter.json, and words of the message
    "another format": ({"format": 2}, "format 2 is not 1"),
    "no format": ({"format": None}, "format None is not 1"),
    "a negative rank": ({"rank": -1}, "rank=-1"),
    "a huge rank": ({"rank": 10**12}, "rank=1000000000000"),
    "a rank that is a flag": ({"rank": True}, "rank=True"),
    "a rank that is a text": ({"rank": "4"}, "rank='4'"),
    "another rank": ({"rank": 5}, "expected F32"),
    "alpha that is none": ({"alpha": float("nan")}, "alpha=nan"),
    "infinite alpha": ({"alpha": float("inf")}, "alpha=inf"),
    "alpha of nothing": ({"alpha": 0}, "alpha=0"),
    "alpha that is a list": ({"alpha": [1]}, "alpha=[1]"),
    "an infinite seed": ({"seed": float("inf")}, "seed=inf"),
    "a seed that is a text": ({"seed": "0"}, "seed='0'"),
    "a code for an init": ({"tying": {"A": {"init": "os.system"}}}, "tying.A.init=os.system"),
    "an init that overflows": ({"tying": {"u": {"init": 1e308}}}, "tying.u.init=1e+308"),
    "an unknown key": ({"tying": {"evil": 1}}, "evil"),
    "a number that no float holds": ({"tying": {"dropout": 10**400}}, "int too large to convert to float"),
    "a target of nothing": ({"tying": {"targets": ["../x"]}}, "'../x' is not a projection"),
    "a list for a target": ({"tying": {"targets": [[]]}}, "must be a list of names"),
    "a list for a module path": (
        {
            "architecture": {"layers": 3, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8}
            | {"layout": {"layers": "x", "sites": {"qkv": [[]]}}}
        },
        "layout.sites.qkv: 'ListConfig' is incompatible",
    ),
    "a negative share": ({"tying": {"A": {"share": -1}}}, "tying.A.share=-1"),
    "a text for a tying": ({"tying": "TABuv"}, "adapter.json: "),
    "a list for a tying": ({"tying": []}, "adapter.json: "),
    "layers that are a word": ({"architecture": {"layers": "many"}}, "'many'"),
    "negative layers": ({"architecture": {"layers": -1}}, "layers=-1"),
    "huge layers": ({"architecture": {"layers": 10**12}}, "layers=1000000000000"),
    "a huge hidden size": ({"architecture": {"hidden": 10**12, "layers": 3}}, "not the sizes of a model"),
    "a secret of the environment": ({"tying": {"name": "${oc.env:HOME}"}}, "holds an interpolation"),
    "no base": ({"base": 3}, "base (with name and digest)"),
    "a base without a name": ({"base": {}}, "base (with name and digest)"),
    "rebuilt parts that are a list": ({"rebuilt": [1]}, "rebuilt must be objects"),
    "a checksum that is none": ({"sha256": None}, "is damaged or was changed"),
}


@pytest.mark.parametrize("what", DESCRIPTIONS)
def test_wrong_descriptions_are_named(what, whole, tmp_path):
    description, data = whole
    changes, says = DESCRIPTIONS[what]
    write(tmp_path / "adapter", {**description, **changes}, data, sign="sha256" not in changes)
    with refused(says, tmp_path):
        load(tmp_path / "adapter")


TEXTS = {
    "empty": (b"", "adapter.json: is not valid JSON"),
    "cut short": (b'{"format": 1', "adapter.json: is not valid JSON"),
    "a list": (b"[1]", "adapter.json: must hold a JSON object"),
    "not UTF-8": (b'{"format": "\xff"}', "adapter.json: is not valid JSON"),
    "a hundred thousand brackets": (b"[" * 100_000, "adapter.json: is not valid JSON"),
    "a number without end": (b'{"rank": ' + b"9" * 5000 + b"}", "adapter.json: is not valid JSON"),
    "a pickle": (pickle.dumps(Evil()), "adapter.json: is not valid JSON"),
}


@pytest.mark.parametrize("what", TEXTS)
def test_what_is_no_description(what, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, says = TEXTS[what]
    write(tmp_path / "adapter", data, whole[1], sign=False)
    with refused(says, tmp_path):
        load(tmp_path / "adapter")
    assert not (tmp_path / "owned").exists()


def test_a_small_file_that_asks_for_a_large_memory(whole, tmp_path):
    """Frozen random parts that were left out are drawn again. A few bytes of the description determine their size."""
    description, _ = whole
    architecture = {**description["architecture"], "hidden": 10**6}
    tying = {**description["tying"], "A": {"trained": False, "init": "uniform", "share": 1}}
    data = save({"qkv.B": torch.zeros(1, 64, 60_000), "qkv.u": torch.ones(3, 60_000), "qkv.v": torch.ones(3, 64)})
    changes = {"architecture": architecture, "tying": tying, "rank": 60_000, "rebuilt": {"qkv.A": "0" * 64}}
    write(tmp_path / "adapter", {**description, **changes}, data)
    tracemalloc.start()
    with refused("180,000,000,000 numbers to draw again from the seed, at most 268,435,456 are", tmp_path):
        load(tmp_path / "adapter")
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_what_is_no_folder_or_file(whole, tmp_path):
    description, data = whole
    model = tiny("tiny_llama").model
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for source in ("empty", "file", "loop", "none", "a\0b", "x" * 5000, "~nobody-here/x"):
        with refused("is neither a finished run nor an adapter's folder"):
            tiedlora.load(tmp_path / source if source[0] != "~" else source, model)
    folder = write(tmp_path / "adapter", description, data)
    (folder / "adapter.safetensors").unlink()
    with refused("adapter.safetensors: is missing"):
        load(folder)
    (folder / "adapter.safetensors").mkdir()
    with refused("adapter.safetensors: is not a regular file"):
        load(folder)
    (folder / "adapter.safetensors").rmdir()
    os.mkfifo(folder / "adapter.safetensors")
    with refused("adapter.safetensors: is not a regular file"):
        load(folder)
    (folder / "adapter.json").unlink()
    os.mkfifo(folder / "adapter.json")
    with refused("is not a regular file"):
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
    "no weights": ({"config.json": b"{}"}, "must be a folder with config.json, tokenizer.json and *.safetensors"),
    "a pickle for weights": ({"config.json": b"{}", "pytorch_model.bin": pickle.dumps(Evil())}, "must be a folder"),
    "a pickle called safetensors": (
        {"config.json": b'{"model_type": "llama"}', "model.safetensors": pickle.dumps(Evil())},
        "cannot be loaded",
    ),
    "a configuration that is none": ({"config.json": b"[", "model.safetensors": b""}, "cannot be loaded"),
    "sizes that are words": (
        {"config.json": b'{"model_type": "llama", "hidden_size": "many"}', "model.safetensors": b""},
        "cannot be loaded",
    ),
    "a tokenizer that is none": (
        {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"", "tokenizer.json": b'{"model": 3}'},
        "cannot be loaded",
    ),
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


@given(st.data())
@search(80)
def test_any_tensors_load_or_are_refused(whole, tmp_path_factory, data):
    """The file with bytes changed, removed or inserted and a matching checksum, or a file of any bytes."""
    description, tensors = whole
    mangled = bytearray(tensors)
    if data.draw(st.integers(0, 9)) == 0:
        mangled = bytearray(data.draw(st.binary(max_size=300)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(mangled), 600)))
        length = data.draw(st.sampled_from([0, 1, 1, 1, 8, 100]))
        mangled[at : at + length] = data.draw(st.binary(max_size=length or 8))
    folder = write(tmp_path_factory.getbasetemp() / "any-tensors", description, bytes(mangled))
    before = snapshot(folder)
    with right_or_refused():
        adapter, _ = load(folder)
        assert all(torch.isfinite(part).all() for part in adapter.parts().values())
    assert snapshot(folder) == before
