"""What README.md and the site share: a notebook as a reader sees it, and where its links lead."""
import posixpath
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
ATTRIBUTE = re.compile(r"""(?P<before>(?:src|href)=["'])(?P<target>[^"'\s]+)""")
LINK = re.compile(r"""(?P<before>\]\(|(?:src|href)=["'])(?P<target>[^)"'\s]+)""")


def read_notebook(path: Path):
    "The notebook without nbdev's directive lines and without the cells that `#| hide` marks."
    notebook = nbformat.read(path, as_version=4)
    cells = []
    for cell in notebook.cells:
        lines = cell.source.splitlines()
        directives = [line[2:].split() for line in lines if line.startswith("#|")]
        if ["hide"] in directives: continue
        module = [words[1] for words in directives if words[0] == "default_exp"]
        if module: cell = nbformat.v4.new_markdown_cell(f"Module `attnnas.{module[0]}`")
        else: cell.source = "\n".join(line for line in lines if not line.startswith("#|"))
        cells.append(cell)
    notebook.cells = cells
    return notebook


def relink(text: str, folder: str, rewrite, link=LINK) -> str:
    """Pass every relative link of Markdown or HTML through `rewrite`.

    `link`: ATTRIBUTE for a page of HTML, where "](" is no link but somebody's code.

    `folder` is where the text's notebook lies, relative to the repository; `rewrite` receives the
    linked path relative to the repository and returns the link to write.
    """
    def replace(match):
        target, _, anchor = match["target"].partition("#")
        if not target or re.match(r"[a-z]+:|/", target): return match[0]
        target = rewrite(posixpath.normpath(posixpath.join(folder, target)))
        return match["before"] + target + ("#" + anchor if anchor else "")
    return link.sub(replace, text)
