"""The pages that are made from the package and its notebooks: `python tests/pages.py` makes them again, `--check` only compares.

Each page of `PAGES` is a notebook in nbs/ with one code cell, which ends in a `Markdown(...)`: that is its output.
The sidebar of the site is made, too: a room is a section, its notebooks stand in the order of their numbers.
"""
import ast, contextlib, json, os, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["results", "map", "api", "commands", "gallery"]
SECTIONS = { # title: pages or folders
    "Guides": ["guides"], "Results": ["results.ipynb", "gallery.ipynb", "paper"],
    "Reference": ["commands.ipynb", "api.ipynb", "map.ipynb", "changelog.md"], "Core": ["core"], "World": ["world"], "Data": ["data"],
    "Recognition": ["recognition"], "Generation": ["generation"], "Sets": ["sets"], "Audit": ["audit"], "Study": ["study"],
    "Speed": ["bench"], "Command line": ["cli"]}


def run(source:str)->str: # markdown
    "What a page's cell puts out, run in the notebooks' folder."
    *body, last = ast.parse(source).body
    names = {}
    with contextlib.chdir(ROOT / "nbs"):
        exec(compile(ast.Module(body, []), "page", "exec"), names)
        return eval(compile(ast.Expression(last.value), "page", "eval"), names).data


def remade(name:str)->str: # the notebook's new text
    "The page with its output made again."
    notebook = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))
    [cell] = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    data = {"text/markdown": run("".join(cell["source"])).splitlines(keepends=True), "text/plain": ["<IPython.core.display.Markdown object>"]}
    cell["outputs"] = [dict(data=data, execution_count=None, metadata={}, output_type="execute_result")]
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def sidebar()->str: # text of nbs/sidebar.yml
    "Every page once; a page that has no section is not listed, and a test says so."
    nbs, lines = ROOT / "nbs", ["website:", "  sidebar:", "    contents:", "      - index.ipynb"]
    for title, parts in SECTIONS.items():
        pages = [p for part in parts for p in ([part] if "." in part else sorted(o.relative_to(nbs).as_posix() for o in (nbs / part).glob("*.ipynb")))]
        lines += [f"      - section: {title}", "        contents:", *(f"          - {p}" for p in pages)]
    return "\n".join(lines) + "\n"


def main(args:list[str])->int: # exit code
    texts = {ROOT / "nbs/sidebar.yml": sidebar(), **{ROOT / "nbs" / f"{name}.ipynb": remade(name) for name in PAGES}}
    old = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in args and old: print(f"out of date: {', '.join(p.name for p in old)}; run `python tests/pages.py`", file=sys.stderr)
    if "--check" in args: return int(bool(old))
    for path in old: path.write_text(texts[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(ROOT)) # the checkout that this file stands in
    sys.exit(main(sys.argv[1:]))
