"Package metadata, read from settings.ini (nbdev's one place for it)."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
statuses = ["Planning", "Pre-Alpha", "Alpha", "Beta", "Production/Stable", "Mature", "Inactive"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"], keywords=cfg["keywords"].split(),
    license="Apache-2.0", license_files=["LICENSE", "cemiface/world/HEAD_LICENSE.md"],
    classifiers=[f"Development Status :: {cfg['status']} - {statuses[int(cfg['status']) - 1]}", f"Intended Audience :: {cfg['audience']}",
                 "Intended Audience :: Science/Research", f"Natural Language :: {cfg['language']}", "Programming Language :: Python :: 3",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    python_requires=f">={cfg['min_python']}", install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("dev", "onnx", "align", "head", "realism", "parquet", "lmdb")},
    packages=find_packages(include=["cemiface", "cemiface.*"]), package_data={"cemiface": ["*.json", "weights/**/*", "world/head.npz", "world/HEAD_LICENSE.md"]},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    zip_safe=False,
)
