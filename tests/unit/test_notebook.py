"""The notebook in examples/ runs offline in a kernel of its own and prints what it shows."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from oracles import ROOT
from pages import same

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """Standard output of each code cell, and the kinds of its other results."""
    found = []
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        texts = [o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout"]
        kinds = [kind for o in cell.outputs if o.output_type != "stream" for kind in sorted(o.data)]
        found.append("".join(texts) + "".join(f"<{kind}>" for kind in kinds))
    return found


@pytest.fixture
def kernel_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel finds this package, has one thread, no network and folders of its own."""
    own = {
        "PYTHONPATH": str(ROOT / "python"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter"),
    }
    for name, value in own.items():
        monkeypatch.setenv(name, value)


@pytest.mark.filterwarnings("default")  # the client's own warnings are no errors of the notebook
@pytest.mark.usefixtures("kernel_environment")
def test_the_notebook_prints_what_it_shows(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shown = printed(notebook)
    assert any("image/png" in text for text in shown)
    assert sum(bool(text) for text in shown) >= 6
    ran = NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for before, after in zip(shown, printed(ran), strict=True):
        assert same(before, after), f"the notebook shows\n{before}\nand prints\n{after}"


def test_the_notebook_is_small_and_names_no_machine():
    text = NOTEBOOK.read_text(encoding="utf8")
    assert len(text) < 200_000
    assert "/home/" not in text
    assert "site-packages" not in text
