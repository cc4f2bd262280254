"""What settings.ini declares, what constraints.txt pins, and what the first needs of the second."""
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def requirements() -> dict[str, list[str]]:
    'The declared requirements by extra; "" is the core.'
    keys = [key for key in settings() if key == "requirements" or key.endswith("_requirements")]
    return {key.removesuffix("requirements").removesuffix("_"): settings()[key].split() for key in keys}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def needed(declared: list[str]) -> set[str]:
    """The distributions reachable from `declared`, by the metadata of those that are installed.

    Markers are evaluated, so what another platform needs is not among them.
    """
    seen = set()

    def visit(text, extras):
        requirement = Requirement(text)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras): return
        name = canonicalize_name(requirement.name)
        new = {(name, extra) for extra in {"", *requirement.extras}} - seen
        seen.update(new)
        if not new: return
        try: further = metadata.requires(name) or []
        except metadata.PackageNotFoundError: return
        for text in further: visit(text, {"", *requirement.extras})

    for text in declared: visit(text, {""})
    return {name for name, _ in seen}


def installed(name: str) -> str | None:
    "The installed version without a local tag such as +cpu, or None."
    try: return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError: return None
