"""The hooks by which mkdocs makes pages of the notebooks in nbs/ (see mkdocs.yml)."""
import html
import os
import re
import shutil
import sys
from functools import cache
from pathlib import Path

import latex2mathml.converter
import nbformat
from mkdocs.structure.files import File, Files
from mkdocs.structure.toc import get_toc
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

sys.path.insert(0, str(Path(__file__).parent))
import api
from notebooks import ATTRIBUTE, ROOT, read_notebook, relink

HEADING = re.compile(r'<h([1-6]) id="([^"]+)">(.*?)<a class="anchor-link"', re.S)
linked = set()  # files outside nbs/ that pages show or link to


class MathML(IPythonRenderer):
    "Markdown as JupyterLab renders it, equations as MathML that the browser draws without a script."
    def inline_math(self, body): return latex2mathml.converter.convert(body)
    def block_math(self, body): return latex2mathml.converter.convert(body, display="block")
    multiline_math = block_math


@cache
def exporter() -> HTMLExporter:
    "What makes a page of a notebook; its templates are read once for all pages."
    made = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    made.register_filter("markdown2html", lambda text: MarkdownWithMath(renderer=MathML(escape=False)).render(text))
    # It would parse each cell's code again, a quarter of all the time, to take out what nobody wrote into it.
    made.register_filter("clean_html", lambda text: text)
    return made


def on_config(config):
    "The menu: a chapter a room, in the order in which the index lists them, then the tables and figures."
    rooms = dict.fromkeys(path.relative_to(ROOT / "nbs").parts[0] for path in read_in_order())
    config.nav = [{"attnnas": "index.md"}]
    config.nav += [{room: pages_of(path for path in read_in_order() if room in path.parts)} for room in rooms]
    config.nav.append({"tables and figures": pages_of(sorted((ROOT / "nbs/paper").glob("*.ipynb")))})
    config.nav.append({"API": [{room: f"api/{room}.md"} for room in api.rooms()]})
    linked.clear()
    return config


def on_files(files, config):
    "Each notebook becomes a page, whose content on_page_content fills in; each room has a page of its API."
    pages = [File.generated(config, path.relative_to(ROOT / "nbs").with_suffix(".md").as_posix(), content="")
             for path in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
    pages += [File.generated(config, f"api/{room}.md", content=api.page(room, modules)) for room, modules in api.rooms().items()]
    style = File.generated(config, "site.css", abs_src_path=str(ROOT / "docs/site.css"))
    return Files([*(file for file in files if not file.src_uri.endswith(".ipynb")), *pages, style])


def on_page_markdown(markdown, page, config, files):
    if is_lesson(page): page.meta["title"] = title(notebook_of(page))
    return markdown


def on_page_content(content, page, config, files):
    if not is_lesson(page): return content
    notebook, folder = notebook_of(page), Path("nbs", page.file.src_uri).parent.as_posix()
    body, _ = exporter().from_notebook_node(read_notebook(notebook))
    body = re.sub(r"<pre><span></span>(.*?)</pre>", r"<pre><span></span><code>\1</code></pre>", body, flags=re.S)
    page.toc = get_toc(contents(HEADING.findall(body)))
    return relink(body, folder, lambda path: site_link(path, Path("nbs", page.file.dest_uri).parent.as_posix()),
                  ATTRIBUTE)


def on_post_build(config):
    "Pictures and files that pages link to travel with the site."
    for path in sorted(linked):
        target = Path(config.site_dir, "files", path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, target)


def site_link(path: str, folder: str) -> str:
    "Where the file at `path` is in the site, as seen from a page of `folder`; both relative to the repository."
    if path.startswith("nbs/"): return os.path.relpath(re.sub(r"\.ipynb$", ".html", path), folder)
    if not (ROOT / path).is_file(): raise SystemExit(f"A notebook in {folder} links to {path}, which is no file.")
    linked.add(path)
    return os.path.relpath(f"nbs/files/{path}", folder)


def read_in_order() -> list:
    "The library's notebooks, as the index links to them."
    text = "\n".join(cell.source for cell in nbformat.read(ROOT / "nbs/index.ipynb", as_version=4).cells)
    links = [ROOT / "nbs" / link for link in re.findall(r"\]\(([a-z][^)]*\.ipynb)\)", text.partition("## Read on")[2])]
    return list(dict.fromkeys(link for link in links if link.parent.name != "paper"))


def pages_of(paths) -> list:
    "Entries of the menu for notebooks."
    return [{title(path): path.relative_to(ROOT / "nbs").with_suffix(".md").as_posix()} for path in paths]


def is_lesson(page) -> bool: return not page.file.src_uri.startswith("api/")


def notebook_of(page) -> Path: return (ROOT / "nbs" / page.file.src_uri).with_suffix(".ipynb")


def title(path: Path) -> str:
    return re.search(r"^# (.+)", nbformat.read(path, as_version=4).cells[0].source, re.M)[1]


def contents(headings) -> list:
    "The nested table of contents that mkdocs wants, from (level, anchor, title) triples."
    top, open_levels = [], []
    for level, anchor, text in headings:
        name = html.unescape(re.sub(r"<[^>]+>", "", text)).strip()
        entry = {"level": int(level), "id": anchor, "name": name, "children": []}
        while open_levels and open_levels[-1]["level"] >= entry["level"]: open_levels.pop()
        (open_levels[-1]["children"] if open_levels else top).append(entry)
        open_levels.append(entry)
    return top
