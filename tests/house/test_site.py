"""What `make docs` makes of docs/ has every page, every public name, and notebooks that are stored without outputs."""

import json
import re
from pathlib import Path

import pytest
from test_public_surface import MODULES

import vvae_fast
from vvae_fast import nn

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def test_the_site_has_every_page():
    """Its list of pages is that of the index: conf.py makes it of the first column of the tables."""
    listed = re.findall(r"^\| \[[^]]*\]\(([\w/.]+)\)", (DOCS / "index.md").read_text(), re.M)
    pages = {str(path.relative_to(DOCS)) for pattern in ("**/*.md", "**/*.ipynb") for path in DOCS.glob(pattern)}
    assert sorted(listed) == sorted(pages - {"index.md"})


def test_the_reference_has_every_public_name():
    text = (DOCS / "api.md").read_text()
    documented = dict(re.findall(r"automodule:: ([\w.]+)\n   :members:(.*)", text))
    assert set(MODULES) <= set(documented)
    assert all(not documented[module] for module in MODULES if module != "vvae_fast")  # all of their names
    own = set(documented["vvae_fast"].replace(",", " ").split())
    assert own | set(nn.__all__) >= set(vvae_fast.__all__) - {"__version__"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stored_without_outputs(path):
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            assert cell["execution_count"] is None
    assert "torch.manual_seed(" in path.read_text()
