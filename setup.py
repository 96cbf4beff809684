"""Reads settings.ini, which nbdev shares, so that the version and the requirements stand in one place."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
with open(here / "settings.ini", encoding="utf-8") as file:  # config.read would pass over a missing file
    config.read_file(file)
cfg = config["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=cfg["author"],
    url=cfg["git_url"],
    keywords=cfg["keywords"],
    python_requires=">=" + cfg["min_python"],
    # Said outright, so that an editable install puts this folder on the path instead of a list of packages:
    # toy/, which the demo and the tests import, is found in a checkout and yet is no part of a wheel.
    package_dir={"": "."},
    packages=find_packages(include=["scfm", "scfm.*"]),
    package_data={"scfm": ["presets/*.yaml", "app.css", "py.typed"]},
    include_package_data=False,
    install_requires=cfg["requirements"].split(),
    extras_require={
        name: cfg[f"{name}_requirements"].split()
        for name in ("data", "video", "evaluate", "adam8bit", "wandb", "app", "docs", "dev")
    },
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
