"""JupyterLab's configuration in this repository: what is saved is clean, so that running a notebook leaves git clean.

Counts of executions and other traces are left out, as `nbdev_clean` does; outputs stay.
"""
from nbdev.clean import clean_jupyter

c.ServerApp.root_dir = "."  # noqa: F821 - Jupyter defines c
c.FileContentsManager.pre_save_hook = clean_jupyter  # noqa: F821
