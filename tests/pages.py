"""The pages that are made from the package and its notebooks: `python tests/pages.py` makes them again, `--check` only compares.

Each page of `PAGES` is a notebook in nbs/ with one code cell, which ends in a `Markdown(...)`: that is its output.
The sidebar of the site is made, too: a room is a section, its notebooks stand in the order of their numbers.
"""
import ast, contextlib, json, os, sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["results", "map", "api", "commands", "gallery"]
SECTIONS = { # title: pages or folders
    "Guides": ["guides"], "Results": ["results.ipynb", "gallery.ipynb", "paper"],
    "Reference": ["commands.ipynb", "api.ipynb", "map.ipynb", "changelog.md"], "Core": ["core"], "World": ["world"], "Data": ["data"],
    "Recognition": ["recognition"], "Generation": ["generation"], "Sets": ["sets"], "Audit": ["audit"], "Study": ["study"],
    "Speed": ["bench"], "Command line": ["cli"]}


def run(name:str)->tuple[dict, dict]: # the notebook, the names that its cell defines
    "A page with the output of its cell made again, in the notebooks' folder."
    notebook = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))
    [cell] = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    *body, last = ast.parse("".join(cell["source"])).body
    names = {}
    with contextlib.chdir(ROOT / "nbs"):
        exec(compile(ast.Module(body, []), name, "exec"), names)
        text = eval(compile(ast.Expression(last.value), name, "eval"), names).data
    data = {"text/markdown": text.splitlines(keepends=True), "text/plain": ["<IPython.core.display.Markdown object>"]}
    cell["outputs"] = [dict(data=data, execution_count=None, metadata={}, output_type="execute_result")]
    return notebook, names


def made()->dict[Path, str]: # path -> text
    "Every page and the sidebar."
    text = lambda name: json.dumps(run(name)[0], indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    return {ROOT / "nbs/sidebar.yml": sidebar(), **{ROOT / "nbs" / f"{name}.ipynb": text(name) for name in PAGES}}


def thumbnails()->dict[Path, Image.Image]: # path -> picture
    "The pictures of the gallery, as the committed figures give them."
    return {ROOT / "nbs" / path: picture for path, picture in run("gallery")[1]["thumbnails"].items()}


def stale(path:Path, picture:Image.Image)->bool:
    "Whether a file is no thumbnail of this picture, up to what JPEG loses."
    if not path.exists(): return True
    off = np.abs(np.asarray(Image.open(path), float) - np.asarray(picture, float)).mean(2)
    return (off > 40).mean() > .003 # a moved line is few pixels, and far off


def sidebar()->str: # text of nbs/sidebar.yml
    "Every page once; a page that has no section is not listed, and a test says so."
    nbs, lines = ROOT / "nbs", ["website:", "  sidebar:", "    contents:", "      - index.ipynb"]
    for title, parts in SECTIONS.items():
        pages = [p for part in parts for p in ([part] if "." in part else sorted(o.relative_to(nbs).as_posix() for o in (nbs / part).glob("*.ipynb")))]
        lines += [f"      - section: {title}", "        contents:", *(f"          - {p}" for p in pages)]
    return "\n".join(lines) + "\n"


def main(args:list[str])->int: # exit code
    texts, pictures = made(), thumbnails()
    old = [p for p, text in texts.items() if not p.exists() or p.read_text(encoding="utf-8") != text] + [p for p, o in pictures.items() if stale(p, o)]
    if "--check" in args and old: print(f"out of date: {', '.join(p.name for p in old)}; run `python tests/pages.py`", file=sys.stderr)
    if "--check" in args: return int(bool(old))
    for path in old:
        path.parent.mkdir(exist_ok=True)
        if path in texts: path.write_text(texts[path], encoding="utf-8")
        else: pictures[path].save(path, quality=80)
    for path in set((ROOT / "nbs/images/gallery").glob("*")) - set(pictures): path.unlink()
    return 0


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(ROOT)) # the checkout that this file stands in
    sys.exit(main(sys.argv[1:]))
