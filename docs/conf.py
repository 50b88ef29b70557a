"""The site that `make docs` makes of these pages. They are written for GitHub, and docstrings are plain text: both are
turned into what Sphinx reads while it reads them."""

import re
from pathlib import Path

from sphinx.application import Sphinx

import vvae_fast

DOCS = Path(__file__).parent

project = "vvae_fast"
author = "vvae_fast authors"
version = release = vvae_fast.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc"]
root_doc = "index"
html_theme = "furo"
html_title = f"vvae_fast {version}"
html_copy_source = False
smartquotes = False  # they would be wrong in docstrings, whose code has no backticks around it everywhere

myst_heading_anchors = 4  # links to a heading are GitHub's: page.md#heading
myst_enable_extensions = ["dollarmath"]  # for the notebooks, whose formulas are Jupyter's

nb_execution_mode = "force"  # a cache would not notice that the package has changed
nb_execution_timeout = 300
nb_execution_show_tb = True  # an error in a notebook is a warning with its traceback, and `make docs` fails on warnings
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
# Types that no page here has: PyTorch's and Python's, whose own sites are not fetched, and what is not public.
nitpick_ignore_regex = [
    ("py:class", r"(torch|pyro|contextlib|pathlib|collections)\..*|(.*\.)?(Tensor|MLP|RunConfig|Dataset)"),
]

# A block that begins and ends with as many backticks.
FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=fence)$", re.M | re.S)
LINK = re.compile(r"(?<!!)\[([^]\n]+)\]\(([\w./-]+)(?:#[\w-]+)?\)")
INLINE_MATH = re.compile(r"\$`([^`]+)`\$")


def read_as_github_does(app: Sphinx, page: str, source: list[str]) -> None:
    """Turns GitHub's formulas into MyST's, and gives the first page the list of all pages, which its tables have."""
    if not (DOCS / f"{page}.md").exists():
        return  # a notebook
    text, parts, end = source[0], [], 0
    for block in FENCE.finditer(text):
        parts += prose(text[end : block.start()]), formula(block) if block["language"] == "math" else block[0]
        end = block.end()
    source[0] = "".join([*parts, prose(text[end:])])
    if page == root_doc:
        pages = re.findall(r"^\| \[[^]]*\]\(([\w/]+)\.(?:md|ipynb)\)", text, re.M)
        source[0] += "\n".join(["\n```{toctree}", ":hidden:", "", *pages, "```", ""])


def prose(text: str) -> str:
    return LINK.sub(link, INLINE_MATH.sub(r"{math}`\1`", text))


def link(match: re.Match[str]) -> str:
    """Files beside docs/ are copied, as Sphinx does of itself unless they are Markdown; folders have no page."""
    text, path = match[1], match[2]
    if (DOCS / path).is_dir():
        return text
    return f"[{text}](path:{path})" if path.startswith("../") and path.endswith(".md") else match[0]


def formula(block: re.Match[str]) -> str:
    r"""Between \[ and \] as it is: Sphinx would put several lines into an environment that takes no \tag."""
    return f"```{{math}}\n:no-wrap:\n\n\\[\n{block['text']}\\]\n```"


def read_docstring(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Makes reStructuredText of plain text, in which only `code`, the sections and their entries have a meaning."""
    parts = re.split(r"`([^`]+)`", "\n".join(lines))
    plain = [re.sub(r"([*_|\\])", r"\\\1", part) for part in parts[::2]]
    parts[::2] = [re.sub(r"docs/(\w+)\.md", r":doc:`docs/\1.md </\1>`", part) for part in plain]
    parts[1::2] = [f"``{part}``" for part in parts[1::2]]
    text = re.sub(r"``(\w+)``(?=\w)", r"``\1``\\ ", "".join(parts))  # `Name`s: the s would hide the end of the code
    text = re.sub(r"^(Args|Returns|Raises):$", r":\1:", text, flags=re.M)
    text = re.sub(r"^ {8}", " " * 6, text, flags=re.M)  # an entry's further lines
    lines[:] = re.sub(r"^ {4}(\w[^:`\n]*):(?= )", r"    - **\1**:", text, flags=re.M).split("\n")


def skip(app: Sphinx, what: str, name: str, value: object, is_skipped: bool, options: object) -> bool | None:
    """Fields of named tuples have Python's docstring, and extra_repr has PyTorch's."""
    return True if name == "extra_repr" or str(value.__doc__).startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    app.connect("source-read", read_as_github_does)
    app.connect("autodoc-process-docstring", read_docstring, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip)
