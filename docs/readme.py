"""Write README.md from nbs/index.ipynb: the same text, with links that lead from the repository's root."""
from nbconvert import MarkdownExporter

from notebooks import ROOT, read_notebook, relink

NOTE = "<!-- Written by `make readme` from nbs/index.ipynb: edit that. -->\n\n"


def readme() -> str:
    text, resources = MarkdownExporter().from_notebook_node(read_notebook(ROOT / "nbs/index.ipynb"))
    if resources["outputs"]:
        raise SystemExit("nbs/index.ipynb holds a picture as an output: link to a file under results/ instead.")
    return NOTE + relink(text, "nbs", lambda path: path).strip() + "\n"


if __name__ == "__main__": (ROOT / "README.md").write_text(readme(), encoding="utf-8")
