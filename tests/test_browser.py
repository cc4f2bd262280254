"""What a reader and a user see in a real browser: the site, the report, JupyterLab, and pictures that react."""
import functools
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from attnnas.evidence.report import write_report
from attnnas.evidence.store import Store
from browser import Browser

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = (390, 1400)  # a telephone's, a desk's
PAGES = ("index.html", "howto/00_quickstart.html", "paper/table_1_composed.html", "cells/03_cell.html", "howto/10_play.html",
         "api/search.html")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site, built and served; its address."
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", folder], cwd=ROOT, check=True,
                   env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def check_page(browser, url: str):
    "Nothing broken, nothing from elsewhere, no error, and no page that has to be pushed sideways."
    page = browser.open(url)
    assert page.broken_images == [] and page.elsewhere == [] and page.errors == []
    for width in WIDTHS:
        page.resize(width)
        assert page.ask("document.documentElement.scrollWidth") <= width, f"{url} at {width} pixels"


@pytest.mark.parametrize("path", PAGES)
def test_pages_of_the_site(browser, site, path):
    check_page(browser, f"{site}/{path}")


def test_report(browser, tmp_path):
    write_report(Store(ROOT / "results"), tmp_path / "report.html", ["quick"])
    check_page(browser, (tmp_path / "report.html").as_uri())


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab as `make lab` starts it, on a copy of the repository; its address."
    copy = tmp_path_factory.mktemp("lab") / "attnnas"
    subprocess.run(["git", "-c", "safe.directory=*", "clone", "--quiet", ROOT, copy], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "lab", "--config", "docs/lab.py", "--allow-root", "--no-browser", f"--port={port}",
               "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]
    folders = {"JUPYTER_CONFIG_DIR": str(copy.parent / "config"), "JUPYTERLAB_SETTINGS_DIR": str(copy.parent / "settings"),
               "JUPYTERLAB_WORKSPACES_DIR": str(copy.parent / "workspaces"), "PYTHONPATH": str(copy)}
    server = subprocess.Popen(command, cwd=copy, env=os.environ | folders, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{port}", copy
    server.terminate()
    server.wait(30)


# A page without a window has no focus, so that JupyterLab's "current widget" is none.
PANEL = "[...window.jupyterapp.shell.widgets('main')].find(w => w.sessionContext)"
CELLS = f"{PANEL}.content.widgets.filter(w => w.model.type == 'code')"


def open_notebook(browser, lab, path: str):
    "Open a notebook in JupyterLab, with a kernel."
    for _ in range(300):
        try: urllib.request.urlopen(f"{lab[0]}/api", timeout=5)
        except OSError: time.sleep(.2)
        else: break
    page = browser.open(f"{lab[0]}/lab/tree/{path}?reset")
    page.until("window.jupyterapp && document.querySelector('.jp-Notebook')")
    page.until(f"{PANEL}?.sessionContext.session?.kernel?.status == 'idle'")
    page.ask(f"window.jupyterapp.shell.activateById({PANEL}.id)")
    page.ask(f"{PANEL}.content.activate()")
    return page


def run_all(page, seconds: float):
    page.ask("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.until(f"{CELLS}.every(w => w.model.executionState != 'running' && w.model.executionCount || !w.model.sharedModel.source.trim())",
               seconds)
    errors = page.ask(f"{CELLS}.flatMap(w => w.model.outputs.toJSON()).filter(o => o.output_type == 'error').map(o => o.evalue)")
    assert errors == []


def test_lab_opens_the_index_and_lessons_without_a_broken_picture(browser, lab):
    for path in ("nbs/index.ipynb", "nbs/cells/03_cell.ipynb", "nbs/paper/table_1_composed.ipynb", "nbs/search/13_verdict.ipynb"):
        page = open_notebook(browser, lab, path)
        assert page.broken_images == [] and page.elsewhere == [], path


def test_the_quickstart_runs_in_lab_and_leaves_its_text_alone(browser, lab):
    page = open_notebook(browser, lab, "nbs/howto/00_quickstart.ipynb")
    run_all(page, 300)
    assert page.broken_images == [] and page.elsewhere == []
    page.ask(f"{PANEL}.context.save()")
    changed = subprocess.run(["git", "-c", "safe.directory=*", "status", "--porcelain"], cwd=lab[1], capture_output=True, text=True).stdout
    assert set(changed.split()) <= {"M", "nbs/howto/00_quickstart.ipynb"}, "outputs that vary are the only change"


def test_pictures_react_to_a_slider_and_a_click(browser, lab):
    page = open_notebook(browser, lab, "nbs/howto/10_play.ipynb")
    run_all(page, 300)
    pictures = "[...document.querySelectorAll('.widget-vbox img')].map(i => i.src)"
    page.until(f"{pictures}.length == 3")
    before = page.ask(pictures)
    page.ask("(h => {h.scrollIntoView({block: 'center'}); h.focus()})(document.querySelector('.widget-vbox .noUi-handle'))")
    page.key("ArrowLeft")
    page.until(f"{pictures}.some((source, k) => source != {json.dumps(before)}[k])")
    after = page.ask(pictures)
    assert [a != b for a, b in zip(before, after)] == [False, True, False], "alpha is the second picture's"
    box = page.ask("""(i => {i.scrollIntoView({block: 'center'}); const b = i.getBoundingClientRect();
                      return [b.x, b.y, b.width, b.height]})([...document.querySelectorAll('.widget-vbox img')][2])""")
    page.click(box[0] + box[2] * .02, box[1] + box[3] * .35)  # another place than the one that is shown first
    page.until(f"{pictures}[2] != {json.dumps(after[2])}")
    assert page.elsewhere == []
