"""Reads settings.ini, which nbdev shares, so that the version and the requirements stand in one place."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini")
cfg = config["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=cfg["author"],
    url=cfg["git_url"],
    keywords=cfg["keywords"],
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=["scfm", "scfm.*", "toy"]),
    package_data={"toy": ["weights/**/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in ("data", "evaluate", "nf4", "wandb", "dev")},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
