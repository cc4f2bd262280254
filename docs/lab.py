"""JupyterLab's configuration in this repository: what is saved is clean, so that running a notebook leaves git clean.

Counts of executions and other traces are left out, as `nbdev_clean` does; outputs stay. A widget's output keeps its picture,
which any page can show, and not its number, which is another one in each session.
"""
from nbdev.clean import clean_jupyter

WIDGET = "application/vnd.jupyter.widget-view+json"


def clean(path, model, **options):
    "Clean a notebook before it is saved."
    clean_jupyter(path, model, **options)
    if model["type"] != "notebook" or model["content"]["nbformat"] != 4: return
    cells = model["content"]["cells"]
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        if {"image/png", "text/html"} & set(output.get("data", {})): output["data"].pop(WIDGET, None)


c.ServerApp.root_dir = "."  # noqa: F821 - Jupyter defines c
c.FileContentsManager.pre_save_hook = clean  # noqa: F821
