"""Checks of the documentation site that need no Quarto, on what `nbdev_proc_nbs` has written: `python tests/check_site.py`.

Links and anchors lead somewhere, also those that nbdev has put around names; such a name has one home; titles differ;
no link stands in code; options keep their dashes.
"""
import json, re, sys
from collections import Counter, defaultdict
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^ *```.*?^ *```", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)(?: [^)]*)?\)")
AUTOMATIC = re.compile(r"\[`([^`]+)`\]\((https?://[^)\s]+)\)")


def slug(heading:str)->str: # the anchor that pandoc makes
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*$]|\{[^}]*\}", r"\1", heading).strip().lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.\-]", "", text)))


def texts(path:Path)->list[str]: # markdown of a page: its cells, and what they put out as markdown
    if path.suffix != ".ipynb": return [path.read_text(encoding="utf-8")]
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    put_out = lambda cell: ["".join(o.get("data", {}).get("text/markdown", "")) for o in cell.get("outputs", [])]
    return [t for c in cells for t in (["".join(c["source"])] if c["cell_type"] != "code" else put_out(c))]


def front_matter(path:Path)->dict: # title, description, output-file
    first = texts(path)[0]
    return yaml.safe_load(first.split("---")[1]) if first.startswith("---") else dict(title=first.splitlines()[0].removeprefix("# "))


def homes()->dict[str, set[str]]: # public name -> modules that define it
    names = {}
    exec((ROOT / "cemiface/_modidx.py").read_text(encoding="utf-8"), names)
    found = defaultdict(set)
    for module, symbols in names["d"]["syms"].items():
        for symbol in symbols: found[symbol.removeprefix(f"{module}.")].add(module)
    return found


def faults(site:Path=ROOT / "_proc")->list[str]:
    "What is wrong with the processed notebooks, a line each."
    pages = sorted(p for p in site.rglob("*") if p.suffix in (".ipynb", ".md", ".qmd"))
    config = yaml.safe_load((site / "_quarto.yml").read_text(encoding="utf-8"))
    website = yaml.safe_load((site / "nbdev.yml").read_text(encoding="utf-8"))["website"]
    prose = {p: [FENCE.sub("", t) for t in texts(p)] for p in pages}
    anchors = {p: {slug(h) for t in prose[p] for h in re.findall(r"^#+ (.+)$", t, re.M)} for p in pages}
    titles = {p: front_matter(p) for p in pages}
    urls = {p.relative_to(site).with_name(titles[p].get("output-file", f"{p.stem}.html")).as_posix(): p for p in pages}
    found = [f"two pages are called {t!r}" for t, n in Counter(str(o.get("title")) for o in titles.values()).items() if n > 1]
    html = config["format"]["html"]
    if not (isinstance(html, dict) and html.get("from", "").endswith("-smart")): found.append("_quarto.yml: --profile would be typeset as a dash")
    several = {n: m for n, m in homes().items() if len(m) > 1}
    for page in pages:
        name = page.relative_to(site).as_posix()
        for text in texts(page): found += [f"{name}: a link in code: {m[0]}" for block in FENCE.findall(text) for m in AUTOMATIC.finditer(block)]
        for link in (m[1] for text in prose[page] for m in LINK.finditer(text)):
            target, _, anchor = link.partition("#")
            if target.startswith(website["site-url"]): there = urls.get(target.removeprefix(website["site-url"]).strip("/"))
            elif re.match(r"https?:|mailto:", target): continue
            else: there = (page.parent / target).resolve() if target else page
            if there is None or not there.exists(): found.append(f"{name}: nothing is at {link}")
            elif anchor and there in anchors and anchor not in anchors[there]: found.append(f"{name}: no such heading: {link}")
        for word, link in (m.groups() for text in prose[page] for m in AUTOMATIC.finditer(text)):
            modules = several.get(word.removesuffix("()"))
            if modules and link.startswith(website["site-url"]) and urls.get(link.partition("#")[0].removeprefix(website["site-url"]).strip("/")) != page:
                found.append(f"{name}: `{word}` leads to {link.split('/')[-1]}, but stands in {', '.join(sorted(modules))}")
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    found = faults()
    print(*found, sep="\n", file=sys.stderr)
    sys.exit(bool(found))
