"""Reads settings.ini, which nbdev reads too, so that nothing is declared twice."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

extras = {key.removesuffix("_requirements"): value.split()
          for key, value in settings.items() if key.endswith("_requirements")}
extras["all"] = sorted({requirement for group in extras.values() for requirement in group})

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    keywords=settings["keywords"],
    platforms=settings["platforms"].split(),
    classifiers=[f"Operating System :: {system}" for system in ("POSIX :: Linux", "MacOS")],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["attnnas", "attnnas.*"]),
    package_data={"attnnas.evidence": ["tiers/*.toml"]},
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": ["attnnas=attnnas._modidx:d"],
    },
    zip_safe=False,
)
