"The order of the house: what a module may import, the numbers of the notebooks, and one home for each public name."
import ast
import json
import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

import cemiface

ROOMS = "core world data recognition generation sets audit study paper bench cli".split()
PACKAGE = Path(cemiface.__file__).parent
NOTEBOOKS = PACKAGE.parent / "nbs"
EXCEPTIONS = set() # public names that may stand in two modules


def imported(path:Path, package:Path)->set[str]:
    "The modules of the package, as room.module, that a module imports, also inside its functions."
    modules = set()
    here = [package.name, *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*here[:len(here) - node.level + 1], *(node.module or "").split(".")] if node.level else node.module.split(".")
            names = [".".join([*filter(None, base), a.name]) for a in node.names] # the name may be a module itself
        else: continue
        for parts in (name.split(".") for name in names):
            if parts[0] == package.name and len(parts) > 2 and (package / parts[1] / f"{parts[2]}.py").exists(): modules.add(".".join(parts[1:3]))
    return modules


def import_graph(package:Path)->dict[str, set[str]]: # room.module -> what it imports
    "All modules in rooms and their imports."
    return {f"{p.parent.name}.{p.stem}": imported(p, package) for p in sorted(package.glob("*/*.py")) if p.stem != "__init__"}


def circles(graph:dict[str, set[str]])->list[list[str]]: # each with its first module again at the end
    "One circle for each module from which an import leads back to a module on the way."
    rings, finished = [], set()
    def visit(module, way):
        if module in way: return rings.append([*way[way.index(module):], module])
        if module in finished: return
        for other in sorted(graph.get(module, ())): visit(other, [*way, module])
        finished.add(module)
    for module in sorted(graph): visit(module, [])
    return rings


def notebook_numbers(notebooks:Path)->dict[str, list[int]]: # room.module -> numbers of the notebooks that export it
    "The number of each module's notebook within its room."
    numbers = defaultdict(list)
    for path in sorted(notebooks.glob("*/[0-9]*.ipynb")):
        text = "\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code")
        if found := re.search(r"#\| *default_exp ([\w.]+)", text): numbers[found[1]].append(int(path.stem.split("_")[0]))
    return dict(numbers)


def faults(package:Path, notebooks:Path)->list[str]:
    "What breaks the order, a line each, with the two names."
    graph, numbers, lines = import_graph(package), notebook_numbers(notebooks), []
    room = lambda module: module.split(".")[0]
    for module in graph:
        if room(module) not in ROOMS: lines.append(f"{module}: {room(module)} is no room")
    for module, others in graph.items():
        for other in sorted(others):
            if room(module) in ROOMS and ROOMS.index(room(module)) < ROOMS.index(room(other)):
                lines.append(f"{module} imports {other} from a room below")
            if room(module) == room(other) and min(numbers.get(module, [0])) <= max(numbers.get(other, [-1])) and module != other:
                lines.append(f"{module} imports {other}, whose notebook has no lower number")
    lines += [" imports ".join(ring) + ": a circle" for ring in circles(graph)]
    by_number = defaultdict(list)
    for module, ns in numbers.items():
        for n in ns: by_number[room(module), n].append(module)
    return lines + [f"{a} and {b} have notebooks of one number" for modules in by_number.values() for a, b in pairwise(modules)]


def public_names_twice(package:Path)->dict[str, list[str]]: # name -> modules
    "Public names (in `__all__`) that more than one module exports."
    homes = defaultdict(list)
    for path in sorted(package.glob("*/*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                for name in ast.literal_eval(node.value): homes[name].append(f"{path.parent.name}.{path.stem}")
    return {name: modules for name, modules in homes.items() if len(modules) > 1}


def test_rooms_import_in_their_order(): assert faults(PACKAGE, NOTEBOOKS) == []


def test_a_public_name_has_one_home():
    twice = public_names_twice(PACKAGE)
    assert set(twice) == EXCEPTIONS, twice


# --- the checker itself, on small trees

def tree(root:Path, modules:dict[str, str], numbers:dict[str, int]={})->tuple[Path, Path]:
    "A package `house` and its notebooks; numbers: of the notebooks of these modules."
    for module, text in modules.items():
        path = root / "house" / (module.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for module, n in numbers.items():
        path = root / "nbs" / module.split(".")[0] / f"{n:02d}_{module.split('.')[1]}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": [f"#| default_exp {module}\n"]}]}))
    return root / "house", root / "nbs"


LATER = "data.images imports recognition.training from a room below"

@pytest.mark.parametrize("text, line", [
    ("from ..recognition.training import embed", LATER), ("from house.recognition.training import embed as e", LATER), ("import house.recognition.training", LATER),
    ("import house.recognition.training as r", LATER), ("from ..recognition import training", LATER), ("from house.recognition import training", LATER),
    ("def f():\n    from ..recognition.training import embed", LATER), ("class A:\n    def f(self):\n        if x: import house.recognition.training", LATER),
    ("from ..core.files import write_whole", None), ("from house.core import files", None), ("import torch, os.path", None), ("from .. import core", None),
    ("from recognition.training import embed", None), ("text = 'from ..recognition.training import embed'", None)])
def test_an_import_from_a_room_below_is_found(tmp_path, text, line):
    house = tree(tmp_path, {"core.files": "", "data.images": text, "recognition.training": ""})
    assert faults(*house) == [line] * (line is not None)


def test_circles_are_found(tmp_path):
    two = tree(tmp_path / "two", {"data.a": "from .b import x", "data.b": "def f(): from .a import y"})
    assert faults(*two) == ["data.a imports data.b imports data.a: a circle"]
    three = tree(tmp_path / "three", {"data.a": "from . import b", "data.b": "from house.data.c import x", "data.c": "from .a import y", "data.d": "from .a import y"})
    assert faults(*three) == ["data.a imports data.b imports data.c imports data.a: a circle"]
    alone = tree(tmp_path / "alone", {"data.a": "from .a import x"})
    assert faults(*alone) == ["data.a imports data.a: a circle"]
    diamond = tree(tmp_path / "diamond", {"data.a": "", "data.b": "from .a import x", "data.c": "from .a import x", "data.d": "from .b import x\nfrom .c import x"})
    assert faults(*diamond) == []


def test_numbers_against_the_imports_are_found(tmp_path):
    modules = {"data.a": "", "data.b": "from .a import x"}
    assert faults(*tree(tmp_path / "right", modules, {"data.a": 1, "data.b": 2})) == []
    assert faults(*tree(tmp_path / "wrong", modules, {"data.a": 2, "data.b": 1})) == ["data.b imports data.a, whose notebook has no lower number"]
    assert faults(*tree(tmp_path / "same", {"data.a": "", "data.b": ""}, {"data.a": 1, "data.b": 1})) == ["data.a and data.b have notebooks of one number"]
    assert faults(*tree(tmp_path / "rooms", {"core.a": "", "data.b": "from ..core.a import x"}, {"core.a": 9, "data.b": 1})) == []


def test_a_folder_that_is_no_room_is_found(tmp_path):
    assert faults(*tree(tmp_path, {"attic.a": ""})) == ["attic.a: attic is no room"]


def test_a_name_with_two_homes_is_found(tmp_path):
    house, _ = tree(tmp_path, {"core.a": "__all__ = ['x', 'y']", "data.b": "__all__ = ['y', 'z']\nx = 1", "data.c": "z = 2"})
    assert public_names_twice(house) == {"y": ["core.a", "data.b"]}
