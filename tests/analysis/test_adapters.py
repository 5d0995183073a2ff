"""Norms and cosines by layer, from adapters' files, against the full matrices of updates."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.report_runs import scored_run

from tiedlora import tying
from tiedlora.adapter import TiedAdapter, files
from tiedlora.analysis import adapters
from tiedlora.analysis.groups import group_runs
from tiedlora.analysis.runs import read_runs
from tiedlora.errors import UserError
from tiedlora.page import write
from tiedlora.records.run_record import BaseModelRecord
from tiedlora.tying import Architecture, Factor

SMALL = Architecture(layers=5, hidden=16, heads=4, kv_heads=2, head_dim=4, intermediate=24)
BASE = BaseModelRecord("org/tiny", "main", "sha256:1")
SPECIFICATIONS = {
    "LoRA": tying.named("LoRA"),
    "TABuv": tying.named("TABuv"),
    "TAB": tying.named("TAB"),
    "Tuv": tying.named("Tuv"),
    "TABuv_v0": tying.named("TABuv_v0"),
    "shared by 2": dataclasses.replace(tying.named("TABuv"), A=Factor(init="uniform", share=2)),
    "three targets": dataclasses.replace(tying.named("TABuv"), targets=["q", "o", "down"]),
    "some layers": dataclasses.replace(tying.named("TABuv"), layers=[0, 3, 4]),
    "RaSA": tying.named("RaSA"),
}


def saved(folder, specification, seed=0, rank=3, alpha=6.0, scaling="standard") -> TiedAdapter:
    """An adapter with random trained parts, in a run's folder."""
    adapter = TiedAdapter(specification, rank, alpha, SMALL, seed, scaling)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.trained_parts().values():
            parameter.normal_(generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    files.save(adapter, folder / "adapter", BASE)
    return adapter


def full_updates(adapter: TiedAdapter) -> np.ndarray:
    """(layers, numbers): every entry of the updates s diag(v_l) B diag(u_l) A of a layer, over all targets."""
    updates: dict[str, np.ndarray] = {}
    for parts in adapter.targets.values():
        part = {name: value.detach().double().numpy() for name, value in parts.named_parameters()}
        of_layer = []
        layers = len(parts.layers)
        for layer in range(layers):
            A, B = (part[name][layer // parts.shares[name]] for name in ("A", "B"))
            u, v = part.get("u", np.ones((layers, len(A)))), part.get("v", np.ones((layers, len(B))))
            scale = tying.scale(adapter.alpha, len(A), adapter.scaling) if parts.term.own_scale else adapter.scale
            of_layer.append(scale * (v[layer][:, None] * B) @ (u[layer][:, None] * A))
        update = np.array(of_layer).reshape(layers, -1)
        updates[parts.target] = updates.get(parts.target, 0) + update
    return np.concatenate(list(updates.values()), 1)


@pytest.mark.parametrize("name", SPECIFICATIONS)
def test_norms_and_cosines_are_those_of_the_full_matrices(tmp_path, name):
    full = [full_updates(saved(tmp_path / str(seed), SPECIFICATIONS[name], seed, scaling="rslora")) for seed in (0, 1)]
    one, other = (adapters.read_adapter(tmp_path / str(seed)) for seed in (0, 1))
    np.testing.assert_allclose(one.norms(), np.linalg.norm(full[0], axis=1), rtol=1e-6)
    expected = (full[0] * full[1]).sum(1) / np.linalg.norm(full[0], axis=1) / np.linalg.norm(full[1], axis=1)
    np.testing.assert_allclose(adapters.cosines(one, other), expected, atol=1e-6)
    np.testing.assert_allclose(adapters.cosines(one, one), 1.0, atol=1e-9)


def test_two_configurations_compare_and_other_layers_or_targets_do_not(tmp_path):
    full = {name: full_updates(saved(tmp_path / name, SPECIFICATIONS[name])) for name in ("LoRA", "TABuv")}
    for name in ("three targets", "some layers"):
        saved(tmp_path / name, SPECIFICATIONS[name])
    read = {path.name: adapters.read_adapter(path) for path in tmp_path.iterdir()}
    norms = [np.linalg.norm(full[name], axis=1) for name in ("LoRA", "TABuv")]
    expected = (full["LoRA"] * full["TABuv"]).sum(1) / norms[0] / norms[1]
    np.testing.assert_allclose(adapters.cosines(read["LoRA"], read["TABuv"]), expected, atol=1e-6)
    assert adapters.cosines(read["LoRA"], read["three targets"]) is None
    assert adapters.cosines(read["LoRA"], read["some layers"]) is None


def test_the_size_of_a_vector_is_one_at_its_usual_start(tmp_path):
    adapter = saved(tmp_path / "run", SPECIFICATIONS["TABuv"])
    with torch.no_grad():
        adapter.targets["qkv"].u.fill_(1.0)
        adapter.targets["qkv"].v[2] = 3.0
    files.save(adapter, tmp_path / "run" / "adapter", BASE)
    read = adapters.read_adapter(tmp_path / "run")
    np.testing.assert_allclose(read.vectors["u"], 1.0)
    assert read.vectors["v"][2] == pytest.approx(3.0)
    saved(tmp_path / "lora", SPECIFICATIONS["LoRA"])
    assert adapters.read_adapter(tmp_path / "lora").vectors == {}


def test_an_update_of_zero_has_no_direction(tmp_path):
    (tmp_path / "run").mkdir()
    files.save(TiedAdapter(tying.named("TABuv"), 3, 3.0, SMALL, 0), tmp_path / "run" / "adapter", BASE)
    read = adapters.read_adapter(tmp_path / "run")
    assert np.isnan(adapters.cosines(read, read)).all()
    np.testing.assert_allclose(read.norms(), 0.0)


def test_a_missing_or_damaged_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no"):
        adapters.read_adapter(tmp_path)
    saved(tmp_path / "run", SPECIFICATIONS["Tuv"])
    (tmp_path / "run" / "adapter" / "adapter.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(UserError, match="is damaged"):
        adapters.read_adapter(tmp_path / "run")


def test_profiles_pair_seeds_and_have_a_reference(tmp_path):
    for name in ("LoRA", "TABuv", "TAB"):
        for seed in (0, 1, 2):
            folder = scored_run(tmp_path, [1.0, 0.0], [0.0, 0.0], name=name, seed=seed)
            if name != "TAB":
                saved(folder, SPECIFICATIONS[name], seed)
    groups = group_runs(read_runs([tmp_path])[0])
    found = adapters.layer_profiles(groups)
    assert found.compared_with == "LoRA r=8"
    assert [profile.name for profile in found.u] == ["TABuv r=8"]
    assert {profile.name for profile in found.updates} == {"LoRA r=8", "TABuv r=8"}
    tied, reference = found.cosines
    assert (tied.name, tied.values.shape) == ("TABuv r=8", (3, 5))
    assert (reference.name, reference.values.shape, reference.is_reference) == ("LoRA r=8, two seeds", (2, 5), True)


def test_the_layers_are_a_figure_and_panels_of_the_page(tmp_path):
    for name in ("LoRA", "TABuv"):
        for seed in (0, 1):
            saved(
                scored_run(tmp_path / "runs", [1.0, 0.0], [0.0, 0.0], name=name, seed=seed), SPECIFICATIONS[name], seed
            )
    write.write(write.build([tmp_path / "runs"]), tmp_path / "report")
    assert "LoRA r=8, two seeds" in (tmp_path / "report" / "layers.svg").read_text()
    page = (tmp_path / "report" / "index.html").read_text()
    for title in ("norm of u", "norm of v", "size of the update", "cosine with LoRA r=8"):
        assert f"<figcaption>chain_sum, {title}</figcaption>" in page
