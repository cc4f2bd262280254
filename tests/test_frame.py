"""The project's frame: lock, export, clean notebooks, README and Makefile say the same thing."""
import ast
import os
import re
import shutil
import statistics
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from declared import ROOT, installed, needed, pins, requirements, settings

NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
TEMPLATES = [path for path in NOTEBOOKS if path.parent.name == "paper"]
LIBRARY = [path for path in NOTEBOOKS if path not in TEMPLATES]
ROOMS = ("core", "attention", "data", "cells", "networks", "visual", "training", "explain", "search", "figures",
         "evidence", "cli")  # from the ground up: a room stands on those before it
MODULES = sorted((ROOT / "attnnas").rglob("*.py"))
CORE = {canonicalize_name(Requirement(text).name) for text in requirements()[""]}
name_of = lambda path: path.relative_to(ROOT).as_posix()
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
each_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


@lru_cache
def cells_of(path) -> list:
    return nbformat.read(path, as_version=4).cells


# ---- dependencies: settings.ini, constraints.txt, environment.yml, Makefile

declared = [text for group in requirements().values() for text in group]


@pytest.mark.parametrize("text", declared)
def test_requirement_is_pinned_inside_its_range(text):
    "If this fails, constraints.txt and settings.ini contradict each other and no install can succeed."
    requirement = Requirement(text)
    version = pins().get(canonicalize_name(requirement.name))
    assert version, f"settings.ini asks for {text}, constraints.txt does not pin it"
    assert requirement.specifier.contains(version), f"constraints.txt pins {requirement.name}=={version}, outside {text}"


def in_locked_environment(extras) -> bool:
    names = [canonicalize_name(Requirement(text).name) for extra in extras for text in requirements()[extra]]
    return all(installed(name) == pins().get(name) for name in names)


@pytest.fixture
def locked():
    if not in_locked_environment(set(requirements()) - {"docs"}): pytest.skip("not the environment that `make` installs")
    return needed([text for extra, group in requirements().items() for text in group
                   if extra != "docs" or in_locked_environment(["docs"])])


def test_lock_is_complete(locked):
    "If this fails, a fresh install takes whatever version of these is newest that day."
    assert {name for name in locked if installed(name)} - set(pins()) == set()


def test_every_pin_is_needed(locked):
    "If this fails, constraints.txt pins what nothing asks for, or what an edit of settings.ini dropped."
    lock = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    docs = {canonicalize_name(line.split("==")[0]) for line in lock.partition("# Only for the extra `docs`")[2].split()}
    spare = set(pins()) - locked - (set() if in_locked_environment(["docs"]) else docs)
    if sys.platform != "linux": spare = {name for name in spare if not name.startswith(("nvidia-", "cuda-", "triton"))}
    assert spare == set()


def test_what_is_installed_is_what_the_lock_says(locked):
    "If this fails, tests pass here with other versions than the ones that a reader installs."
    wrong = {name: (installed(name), version) for name, version in pins().items() if installed(name) not in (None, version)}
    assert wrong == {}


def test_conda_users_install_the_same_as_make():
    "If this fails, environment.yml describes another environment than the Makefile's."
    yaml = pytest.importorskip("yaml")
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, from_pip = environment["dependencies"]
    assert (python, pip) == (f"python>={settings()['min_python']}", "pip")
    assert from_pip["pip"][0] == "-c constraints.txt"
    extras = re.fullmatch(r"-e \.\[(.*)\]", from_pip["pip"][1])[1]
    assert f'-e ".[{extras}]"' in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(extras.split(",")) == set(requirements()) - {"", "docs"}


# ---- notebooks and what is generated from them

@pytest.fixture
def copy(tmp_path):
    "A copy of the notebooks and of settings.ini, for commands that write in place."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return tmp_path


def run_nbdev(command: str, folder: Path):
    environment = dict(os.environ, XDG_CONFIG_HOME=str(folder / ".config"), PYTHONPATH="")
    environment.pop("IN_TEST", None)
    code = f"import sys; from nbdev.cli import {command} as command; sys.argv = ['{command}']; command()"
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)


def texts(folder: Path, pattern: str) -> dict:
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in sorted(folder.rglob(pattern))}


def differing(ours: dict, theirs: dict) -> list:
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def test_package_is_what_the_notebooks_export(copy):
    "If this fails, attnnas/ was edited by hand, not exported, or holds a module whose notebook is gone: `make export`."
    package = texts(ROOT / "attnnas", "*.py")
    for name, text in package.items():
        by_hand = "AUTOGENERATED! DO NOT EDIT!" not in text and name != "_modidx.py"
        (copy / "attnnas" / name).parent.mkdir(parents=True, exist_ok=True)
        if by_hand: (copy / "attnnas" / name).write_text(text, encoding="utf-8")
    run_nbdev("nbdev_export", copy)
    assert differing(package, texts(copy / "attnnas", "*.py")) == []


def test_notebooks_are_clean(copy):
    "If this fails, a diff of the named notebooks shows execution counts and metadata: `make export` cleans them."
    run_nbdev("nbdev_clean", copy)
    ours = {name: text for name, text in texts(ROOT / "nbs", "*.ipynb").items() if ".ipynb_checkpoints" not in name}
    assert differing(ours, texts(copy / "nbs", "*.ipynb")) == []


def test_cleaning_keeps_the_parameters_tag(tmp_path):
    "If this fails, a cleaned template loses its tag, and papermill's values are silently overwritten by the defaults."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    cell = nbformat.v4.new_code_cell("tier = 'quick'", execution_count=7, metadata={"tags": ["parameters"], "other": 1})
    (tmp_path / "nbs").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "nbs/template.ipynb")
    run_nbdev("nbdev_clean", tmp_path)
    cell = nbformat.read(tmp_path / "nbs/template.ipynb", as_version=4).cells[0]
    assert cell.metadata == {"tags": ["parameters"]} and cell.execution_count is None


@pytest.mark.parametrize("path", TEMPLATES, ids=name_of)
def test_template_has_one_parameters_cell(path):
    "If this fails, papermill cannot hand this template its values, or hands them twice."
    cells = cells_of(path)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1


@each_notebook
def test_notebook_names_its_language(path):
    "If this fails, papermill does not know how to write this notebook's parameters."
    assert nbformat.read(path, as_version=4).metadata.kernelspec.language == "python"


@each_notebook
def test_notebook_opens_with_title_and_subtitle(path):
    "If this fails, the site's menu and the module's docstring have no text to show."
    first = cells_of(path)[0]
    assert first.cell_type == "markdown" and re.match(r"# \S.*\n\n> \S.*", first.source)


@each_notebook
def test_imports_have_cells_of_their_own(path):
    "If this fails, nbdev runs the rest of an import cell when it reads the notebook for its documentation."
    for cell in cells_of(path):
        if cell.cell_type != "code": continue
        nodes = ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!")))).body
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes}
        assert len(kinds) < 2, f"imports and other code in one cell:\n{cell.source}"


@each_notebook
def test_notebook_is_small_enough_to_read(path):
    "If this fails, the notebook wants splitting, or its pictures want to be smaller."
    code = [cell.source for cell in cells_of(path) if cell.cell_type == "code"]
    lines = [sum(bool(line.strip()) and not line.startswith("#|") for line in source.splitlines()) for source in code]
    assert path.stat().st_size < 300_000
    assert not lines or statistics.median(lines) <= 12


@pytest.fixture
def documents(monkeypatch):
    "The scripts in docs/, importable."
    monkeypatch.syspath_prepend(str(ROOT / "docs"))


def test_readme_is_what_the_index_generates(documents):
    "If this fails, README.md and nbs/index.ipynb tell different stories: `make readme`."
    from readme import readme
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme()


@each_notebook
def test_notebook_shows_no_path_of_the_machine_that_ran_it(path):
    "If this fails, an output holds a warning or a traceback with somebody's folders in it."
    assert "site-packages" not in path.read_text(encoding="utf-8")


@each_notebook
def test_links_lead_to_files(path, documents):
    "If this fails, a reader clicks on a link of this notebook and finds nothing."
    from notebooks import relink
    targets = []
    for cell in cells_of(path):
        if cell.cell_type != "markdown": continue
        relink(cell.source, name_of(path.parent), lambda target: targets.append(target) or target)
    assert [target for target in targets if not (ROOT / target).exists()] == []


# ---- the package

def imports(path: Path):
    "(imported module, whether at module level) for each import in a module of the package; relative ones made absolute."
    package = path.relative_to(ROOT).parent.parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {id(node) for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
             for node in ast.walk(function)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = ".".join([*package[:len(package) + 1 - node.level]] if node.level else [])
            base = ".".join(filter(None, [base, node.module]))
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names: yield name, id(node) not in inner


@each_module
def test_importing_the_package_needs_the_core_requirements_only(path):
    "If this fails, `import attnnas` breaks or slows down where only torch, numpy, safetensors and tqdm are installed."
    allowed = CORE | sys.stdlib_module_names | {"attnnas"}
    assert {name for name, top in imports(path) if top and name.split(".")[0] not in allowed} == set()


@each_module
def test_package_uses_no_notebook_tools_and_no_star_imports(path):
    "If this fails, users need nbdev at run time, or names appear from nowhere."
    assert [name for name, _ in imports(path) if name.split(".")[0] in ("nbdev", "fastcore", "execnb") or name.endswith("*")] == []


@lru_cache
def exported_modules() -> dict:
    "Module name -> the path of its notebook below nbs/, without the ending."
    found = {}
    for path in LIBRARY:
        code = "\n".join(cell.source for cell in cells_of(path) if cell.cell_type == "code")
        for module in re.findall(r"^#\| default_exp (\S+)", code, re.M):
            found[module] = path.relative_to(ROOT / "nbs").with_suffix("")
    return found


def test_a_notebook_lies_where_its_module_does():
    "If this fails, a reader of nbs/<room>/NN_name.ipynb does not find its code in attnnas/<room>/name.py."
    lies = {module: ".".join([*path.parts[:-1], re.sub(r"^\d\d_", "", path.name)])
            for module, path in exported_modules().items()}
    assert {module: place for module, place in lies.items() if place != module} == {}


def arrows(path: Path) -> set:
    "The modules of this package that the module at `path` imports, imports inside functions included."
    known = exported_modules()
    names = {name.removeprefix("attnnas.") for name, _ in imports(path) if name.startswith("attnnas.")}
    return {module for module in known for name in names if name == module or name.startswith(module + ".")}


FOLDERS = {"cells/operations": "00", "evidence/tables": "06_tables"}  # where a folder of a room stands among its notebooks


@pytest.mark.parametrize("module", exported_modules())
def test_arrows_go_down(module):
    "If this fails, a room needs one above it, or a lesson one that comes later in its room."
    place = exported_modules()

    def height(name):
        room, *folder, notebook = place[name].parts
        stands = FOLDERS["/".join([room, *folder])] if folder else notebook
        return ROOMS.index(room), stands, notebook

    path = (ROOT / "attnnas" / module.replace(".", "/")).with_suffix(".py")
    assert [other for other in arrows(path) if height(other) > height(module)] == []


FOUND_BY_NAME = {"networks/registry.py": "a model's builder, by the registry's own table",
                 "attention/triton.py": "the package triton, where it is installed"}


@each_module
def test_no_module_is_found_by_a_string(path):
    "If this fails, an arrow hides from the test above."
    if path.relative_to(ROOT / "attnnas").as_posix() in FOUND_BY_NAME: return
    assert not re.search(r"\b(import_module|__import__)\b", path.read_text(encoding="utf-8"))


def test_code_is_read_once():
    "If this fails, a line is longer than a reader takes in, a function has more than 40 statements, or a name is unused."
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--output-format", "concise", "."], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- the Makefile

def make(*arguments) -> str:
    if not shutil.which("make"): pytest.skip("no make")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


def test_make_alone_explains_every_target():
    "If this fails, a newcomer who types `make` does not learn of a target, or something starts to install."
    targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1].split()
    lines = make().splitlines()
    assert [line.split()[1] for line in lines] == targets and all(len(line.split()) > 3 for line in lines)


def test_make_reproduce_passes_on_what_was_asked_for_and_nothing_else():
    "If this fails, `make reproduce TIER=smoke` runs something else than the reader asked for."
    plain = make("--dry-run", "reproduce")
    assert "attnnas reproduce --tier quick --results \"reproduced\" --device auto" in plain
    assert not re.search("--template|--fresh|--workers", plain)
    asked = make("--dry-run", "reproduce", "TIER=smoke", "RESULTS=there", "TEMPLATE=table_1", "FRESH=1", "WORKERS=3")
    assert re.search(r'--tier smoke --results "there" --device auto.*--template "table_1" --fresh --workers 3', asked, re.S)


def test_the_quickstart_installs_the_package_where_it_is_missing():
    "If this fails, who opens it in Colab or Binder sees an error in its first cell."
    import builtins
    installed_by = []

    class Shell:
        def run_line_magic(self, *what): installed_by.append(what)

    def find(name, *rest):
        if name == "attnnas" and not installed_by: raise ModuleNotFoundError(name)
        return __import__(name, *rest)

    first = next(cell.source for cell in cells_of(ROOT / "nbs/howto/00_quickstart.ipynb") if cell.cell_type == "code")
    exec(first, {"get_ipython": Shell, "__builtins__": vars(builtins) | {"__import__": find}})
    (magic, line), = installed_by
    assert magic == "pip" and f"'attnnas[notebooks] @ git+{settings()['git_url']}'" in line
