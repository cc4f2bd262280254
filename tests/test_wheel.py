"""The wheel: what a user gets who installs attnnas and its core requirements, and none of the tools."""
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from declared import ROOT, needed, requirements, settings

# Runs in an isolated interpreter: argv is the installed wheel, the hidden top-level names, and what to import.
# What is hidden is not found, exactly as if it were not installed.
RUN = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
site, hidden, names = sys.argv[1], set(sys.argv[2].split()), sys.argv[3].split()

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

sys.path.insert(0, site)
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Installed]
before = set(sys.modules)
for name in names: __import__(name)
if not sys.modules["attnnas"].__file__.startswith(site): sys.exit("imported from the repository, not from the wheel")
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def core_names() -> set[str]:
    "The top-level modules of the core requirements and of what those need."
    core = needed(requirements()[""])
    return {name for name, owners in packages_distributions().items() if core & {canonicalize_name(o) for o in owners}}


def tools() -> set[str]:
    "The top-level modules of everything else that is installed here."
    return set(packages_distributions()) - core_names() - {"attnnas"}


def modules() -> list[str]:
    paths = sorted((ROOT / "attnnas").rglob("*.py"))
    dotted = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if path.name != "_modidx.py"]
    return [name.removesuffix(".__init__") for name in dotted]


def import_from(site: Path, hidden: set, names: list) -> subprocess.CompletedProcess:
    command = [sys.executable, "-I", "-c", RUN, str(site), " ".join(sorted(hidden)), " ".join(names)]
    return subprocess.run(command, cwd=site, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The wheel, built from the source archive, which is built from a copy of what the repository tracks."
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT / "attnnas", source / "attnnas", ignore=leave_out)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."): shutil.copy(path, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    "The wheel installed alone, without its requirements."
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder),
                    str(wheel)], check=True)
    return folder


def test_wheel_holds_the_package_its_tiers_and_its_licence(wheel):
    "If this fails, the installed package lacks a module, a tier file or the licence, or carries tests along."
    names = zipfile.ZipFile(wheel).namelist()
    wanted = {path.relative_to(ROOT).as_posix() for pattern in ("*.py", "tiers/*.toml")
              for path in (ROOT / "attnnas").rglob(pattern)}
    info = next(name for name in names if name.endswith("/METADATA")).rpartition("/")[0]
    packaged = {name for name in names if not name.startswith(info)}
    assert packaged == wanted
    assert f"{info}/licenses/LICENSE" in names


def test_wheel_declares_the_requirements_of_settings_ini(site):
    "If this fails, pip installs other requirements than settings.ini declares."
    from importlib.metadata import Distribution
    found = next(Distribution.discover(name="attnnas", path=[str(site)]))
    core = [text for text in found.requires if "extra ==" not in text]
    assert {*core} == {*requirements()[""]} and found.version == settings()["version"]
    assert {*found.metadata.get_all("Provides-Extra")} == {*requirements(), "all"} - {""}


def test_every_module_imports_with_the_core_requirements_alone(site):
    "If this fails, `pip install attnnas` gives a package part of which cannot be imported."
    done = import_from(site, tools(), modules())
    assert done.returncode == 0, done.stderr


def test_absent_tools_are_noticed(site):
    "If this fails, the check above would let an import of matplotlib pass."
    done = import_from(site, tools(), ["attnnas", "matplotlib"])
    assert "No module named 'matplotlib'" in done.stderr


def test_importing_attnnas_loads_torch_and_nothing_heavier(site):
    "If this fails, `import attnnas` became slow: it loads pandas, matplotlib, torchvision or the like at once."
    done = import_from(site, set(), ["attnnas"])
    assert done.returncode == 0, done.stderr
    assert tools() & {*done.stdout.split()} == set()


def test_command_leads_somewhere(site):
    "If this fails, the `attnnas` command that pip installs ends in an import error."
    target = settings()["console_scripts"].partition("=")[2]
    module, _, function = target.partition(":")
    done = import_from(site, tools(), [module])
    assert done.returncode == 0, done.stderr
    assert f"def {function}(" in (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")


@pytest.mark.slow
def test_wheel_works_in_an_environment_of_its_own(wheel, tmp_path):
    "If this fails, a user's `pip install attnnas` does not end in a package that imports and a command that answers."
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    run = lambda *command: subprocess.run([str(c) for c in command], check=True, cwd=tmp_path, capture_output=True, text=True)
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    run(python, "-m", "pip", "check")
    run(python, "-I", "-c", "; ".join(f"import {name}" for name in modules()))
    assert "reproduce" in run(tmp_path / "venv/bin/attnnas", "--help").stdout
    assert "kinetics600" in run(tmp_path / "venv/bin/attnnas", "data", "--help").stdout
