"The project around the library: notebooks fit to publish, package metadata, README in step with its notebook."
import ast, configparser, importlib.resources, json, os, re, subprocess, sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.requirements import Requirement

import check_site
import cemiface
import pages
from cemiface._docs import FoldResults, plain_code
from readme import ROOT, readme, relink

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts))
MODULES = sorted((ROOT / "cemiface").rglob("*.py"))
ABSOLUTE = re.compile(r"(?<![\w.:/<~])/(?:[\w.+-]+/)+[\w.+-]+|\b[A-Z]:\\\w")  # a path from the root, at least one folder deep
PROGRESS = re.compile(r"\d+%\||\bit/s\b|\bs/it\b")
IMPORT_NAME = {"scikit-learn": "sklearn", "pillow": "PIL", "opencv-python-headless": "cv2", "dlib-bin": "dlib", "face-recognition-models": "face_recognition_models"}
here = lambda p: p.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def settings():
    config = configparser.ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def cells(path, kind="code"): return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]

def output_texts(path): # every text of every output, joined
    for cell in cells(path):
        for out in cell["outputs"]:
            yield "".join(out.get("text", ""))
            yield from ("".join(v) for k, v in out.get("data", {}).items() if k.startswith("text/"))

def imported(path): # top-level packages that a module imports anywhere
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): yield from (a.name.split(".")[0] for a in node.names)
        if isinstance(node, ast.ImportFrom) and node.level == 0: yield node.module.split(".")[0]

def imported_by_cells(path): # top-level packages that a notebook imports at the start of a line
    for cell in cells(path):
        for names, package in re.findall(r"^[ \t]*(?:import ([\w., ]+)|from (\w+)[\w.]* import)", "".join(cell["source"]), re.M):
            yield from [package] if package else (o.strip().split(" ")[0].split(".")[0] for o in names.split(","))


# --- notebooks

@pytest.mark.parametrize("path", NOTEBOOKS, ids=here)
def test_notebook_is_fit_to_publish(path):
    assert path.stat().st_size <= 500_000, "over 500 KB: fewer or smaller figures"
    assert not [o for c in cells(path) for o in c["outputs"] if o["output_type"] == "error"]
    title = next(text for c in cells(path, "markdown") if (text := "".join(c["source"])).startswith("# "))
    assert re.fullmatch(r"# .+\n+> .+", title.strip()), "the site takes title and line from this cell and drops the rest of it: a cell of its own"
    assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"], "the state of widgets, such as bars: remove it"
    for text in (re.sub(r"data:image/\w+;base64,[\w+/=]+", "", text) for text in output_texts(path)): # pictures in a page
        assert not ABSOLUTE.search(text), f"an absolute path in an output: {ABSOLUTE.search(text)[0]}"
        assert not PROGRESS.search(text), f"a progress bar in an output: {PROGRESS.search(text)[0]}"
    sources = "\n".join("".join(c["source"]) for c in cells(path) + cells(path, "markdown"))
    assert str(ROOT) not in sources and str(Path.home()) + os.sep not in sources


@pytest.mark.parametrize("text,bad", [("/home/me/x.png", True), ("see '/tmp/a/b'", True), (r"C:\Users", True), ("cemiface/data.py", False),
                                      ("https://a.b/c/d", False), ("<td>1</td>", False), ("1/2/3", False), ("../nbs/x/y", False)])
def test_absolute_paths_are_told_from_others(text, bad): assert bool(ABSOLUTE.search(text)) == bad


def test_notebooks_fit_together():
    assert sum(p.stat().st_size for p in NOTEBOOKS) <= 10_000_000
    names = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join("".join(c["source"]) for p in NOTEBOOKS for c in cells(p)), re.M)
    assert len(names) == len(set(names)), "two notebooks export one module"
    assert all((ROOT / "cemiface" / f"{n.replace('.', '/')}.py").exists() for n in names)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name == "paper"], ids=here)
def test_result_notebook_keeps_its_results(path): assert any(c["outputs"] for c in cells(path))


def test_sidebar_lists_every_notebook_once():
    def walk(items): return [o for i in items for o in (walk(i["contents"]) if isinstance(i, dict) else [i])]
    listed = walk(yaml.safe_load((ROOT / "nbs/sidebar.yml").read_text())["website"]["sidebar"]["contents"])
    assert sorted(listed) == sorted(["changelog.md", *(p.relative_to(ROOT / "nbs").as_posix() for p in NOTEBOOKS)])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=here)
def test_every_figure_has_a_text_in_its_place(path):
    "`#| fig-alt: ...` at the top of a cell that draws, as Quarto reads it; text in the brackets of a Markdown picture."
    drawn = [c for c in cells(path) if any(k.startswith("image/") for o in c["outputs"] for k in o.get("data", {}))]
    assert [c["id"] for c in drawn if not re.search(r"^#\| fig-alt: \S.{10}", "".join(c["source"]), re.M)] == []
    assert not re.search(r"!\[\s*\]\(", "\n".join([*("".join(c["source"]) for c in cells(path, "markdown")), *output_texts(path)]))


# --- documentation site and README

def test_site_configuration(settings):
    assert (ROOT / "nbs/_quarto.yml").is_symlink() and os.readlink(ROOT / "nbs/_quarto.yml") == "../_quarto.yml"
    quarto, generated = (yaml.safe_load((ROOT / f).read_text()) for f in ("_quarto.yml", "nbs/nbdev.yml"))
    assert quarto["website"]["repo-subdir"] == settings["nbs_path"] and quarto["format"]["html"]["from"].endswith("-smart") # --profile is no dash
    bar = [o["href"] for o in quarto["website"]["navbar"]["left"]]
    assert all((ROOT / "nbs" / f).exists() for f in [quarto["website"]["favicon"], *bar])
    picture = quarto["website"]["open-graph"]["image"].removeprefix(settings["doc_host"] + settings["doc_baseurl"] + "/")
    assert (ROOT / "nbs" / picture).exists() and quarto["website"]["twitter-card"]["image"] == quarto["website"]["open-graph"]["image"]
    assert quarto["project"]["type"] == "website" and all((ROOT / "nbs" / f).exists() for f in [*quarto["metadata-files"], quarto["format"]["html"]["css"]])
    assert generated["project"]["output-dir"] == settings["doc_path"] and settings["custom_sidebar"] == "True"
    site = dict(title="title", description="description", **{"repo-branch": "branch", "repo-url": "git_url"})
    assert {k: generated["website"][k] for k in site} == {k: settings[v] for k, v in site.items()}


def test_readme_is_the_index_notebook(): assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run `python tests/readme.py`"


def test_readme_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "pip install -e . && cemiface reproduce" in lines
    assert [o for o in lines if o.startswith("pip install -e '.[dev]'")] == ["pip install -e '.[dev]' && nbdev_test && pytest"]


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:|#)([^)\s#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links and [o for o in links if not (ROOT / o).exists()] == []


def test_links_between_notebooks_lead_somewhere():
    "Relative links of every notebook, with their anchors as Quarto makes them of headings."
    slug = lambda heading: re.sub(r"[^\w\- ]", "", re.sub(r"[`*$]", "", heading).strip().lower()).replace(" ", "-").lstrip("0123456789-.")
    heads = {p: {slug(h) for c in cells(p, "markdown") for h in re.findall(r"^#+ (.+)$", "".join(c["source"]), re.M)} for p in NOTEBOOKS}
    broken = []
    for p in NOTEBOOKS:
        for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", "\n".join("".join(c["source"]) for c in cells(p, "markdown"))):
            name, _, anchor = link.partition("#")
            there = (p.parent / name).resolve() if name else p
            if not there.exists() or (anchor and anchor not in heads.get(there, ())): broken.append(f"{here(p)}: {link}")
    assert broken == []


@pytest.fixture(scope="module")
def made(): return pages.made()


@pytest.mark.parametrize("name", ["sidebar.yml", *(f"{p}.ipynb" for p in pages.PAGES)])
def test_page_is_what_the_package_gives(made, name):
    path = ROOT / "nbs" / name
    here, now = path.read_text(encoding="utf-8"), made[path]
    if name == "commands.ipynb" and f"Printed by typer {version('typer')}." not in here: # another release sets the same help differently
        here, now = (re.findall(r"^## .+$|--[a-z-]+", o, re.M) for o in (here, now))
    assert here == now, "run `python tests/pages.py`"


def test_gallery_shows_the_committed_figures():
    pictures = pages.thumbnails()
    assert [here(p) for p, picture in pictures.items() if pages.stale(p, picture)] == [], "run `python tests/pages.py`"
    assert set(pictures) == set((ROOT / "nbs/images/gallery").glob("*")) and sum(p.stat().st_size for p in pictures) < 400_000


def page_text(made, name): # what its one code cell puts out
    return next("".join(c["outputs"][0]["data"]["text/markdown"]) for c in json.loads(made[ROOT / f"nbs/{name}.ipynb"])["cells"] if c["cell_type"] == "code")


def test_results_at_a_glance_names_every_result(made):
    from importlib import import_module
    from cemiface.paper.reproduce import RESULTS
    text = page_text(made, "results")
    rows = re.findall(r"^\| (.+?) \| `cemiface reproduce (\w+)` \| \[.+?\]\((\S+)\) \| \[?(\w+)\.(\w+)(?:\]\(\S+\))? \|$", text, re.M)
    assert {r[1]: r[0] for r in rows} == {n: r.title for n, r in RESULTS.items()} and len(rows) == text.count("\n") - 1
    for _, name, path, module, function in rows:
        assert f"#| default_exp paper.{module}" in "".join(cells(ROOT / "nbs" / path)[0]["source"])
        assert name == function and getattr(import_module(f"cemiface.paper.{module}"), function) is RESULTS[name].make


def test_commands_page_names_every_command(made):
    import typer
    from cemiface.cli.app import app
    walk = lambda group, words: [words, *(o for n, c in getattr(group, "commands", {}).items() for o in walk(c, [*words, n]))]
    text = page_text(made, "commands")
    assert re.findall(r"^## (.+)$", text, re.M) == [" ".join(o) for o in walk(typer.main.get_command(app), ["cemiface"])]
    assert text.count("Usage: cemiface") == text.count("## cemiface")


@pytest.mark.parametrize("heading,anchor", [("3.1 The `m` grid: a $x$ test", "the-m-grid-a-x-test"), ("Samples.load", "samples.load"), ("Does it *hold*?", "does-it-hold"),
                                            ("Figure 2: what [it](x.ipynb) is", "figure-2-what-it-is"), ("m_grid", "m_grid")])
def test_anchors_are_pandocs(heading, anchor): assert check_site.slug(heading) == anchor


def test_faults_of_a_site_are_named(tmp_path):
    url, front = "https://x.y/z", lambda title, page: f"---\noutput-file: {page}.html\ntitle: {title}\n---\n"
    page = lambda name, *texts: (tmp_path / name).write_text(json.dumps(dict(cells=[dict(cell_type="markdown", source=t) for t in texts])))
    (tmp_path / "nbdev.yml").write_text(f"website: {{site-url: {url}}}")
    (tmp_path / "_quarto.yml").write_text("format: {html: {from: markdown-smart}}")
    page("01_a.ipynb", front("A", "a"), f"# Part\n\n[x](02_b.ipynb#there) [`f`]({url}/b.html#there) [y](#part) [z](https://else.where)")
    page("02_b.ipynb", front("B", "b"), "## There")
    assert check_site.faults(tmp_path) == []
    page("02_b.ipynb", front("A", "b"), f"## Here\n\n[q](03_c.ipynb)\n\n```python\n# [`f`]({url}/a.html#f)\n```")
    (tmp_path / "_quarto.yml").write_text("format: {html: default}")
    found = "\n".join(check_site.faults(tmp_path))
    for fault in ("two pages are called 'A'", "typeset as a dash", "01_a.ipynb: no such heading: 02_b.ipynb#there", f"no such heading: {url}/b.html#there",
                  "02_b.ipynb: nothing is at 03_c.ipynb", "02_b.ipynb: a link in code"): assert fault in found


def test_code_blocks_on_the_site_are_plain():
    linked = "[`a`](https://x.y/a.html#a)"
    for text in (block := f"{linked}\n\n```python\ndef f(x): # {linked}\n```\n", block.splitlines(keepends=True)):
        plain_code(cell := dict(outputs=[dict(data={"text/markdown": text}), dict(text="stream")]))
        assert "".join(cell["outputs"][0]["data"]["text/markdown"]) == f"{linked}\n\n```python\ndef f(x): # `a`\n```\n"
    plain_code(dict(cell_type="markdown", source="no outputs"))


def test_code_of_results_is_folded_on_the_site():
    cell = lambda kind, source: SimpleNamespace(cell_type=kind, source=source)
    for code, folded in (('found = shown(["table1"])', True), ("def shown(names): ...", False)):
        nb = SimpleNamespace(cells=[cell("raw", "---\ntitle: A\n---\n"), cell("markdown", "found = shown()"), cell("code", code)])
        FoldResults(nb).end()
        assert nb.cells[0].source == "---\n" + "code-fold: true\n" * folded + "title: A\n---\n"


def test_relink():
    assert relink("![a](images/a.png) [b](x.ipynb)") == "![a](nbs/images/a.png) [b](nbs/x.ipynb)"
    assert relink("[c](https://x.y/z) [d](#e) [f](../LICENSE)") == "[c](https://x.y/z) [d](#e) [f](LICENSE)"
    assert relink('<img src="images/a.png">') == '<img src="nbs/images/a.png">'
    assert relink("```\n[b](x)\n```\n[b](x)") == "```\n[b](x)\n```\n[b](nbs/x)"


def test_readme_keeps_visible_code_and_drops_hidden(tmp_path):
    code = lambda source, *outs: dict(cell_type="code", source=source, outputs=[dict(output_type="stream", text=o) for o in outs])
    book = [dict(cell_type="markdown", source="# T\n\n> d"), code("#| hide\nsecret = 1"), code("#| echo: true\nprint(2)", "2\n")]
    (tmp_path / "index.ipynb").write_text(json.dumps(dict(cells=book)))
    text = readme(tmp_path / "index.ipynb")
    assert text.startswith("# T\n\n> d\n\n<!-- WARNING") and "secret" not in text
    assert text.endswith("```python\nprint(2)\n```\n\n```\n2\n```\n")


def test_readme_embeds_what_a_notebook_put_out(tmp_path):
    cell = dict(cell_type="code", source="#| label: truth\n40 + 2", outputs=[dict(output_type="execute_result", data={"text/plain": "x", "text/markdown": "**42**"})])
    (tmp_path / "book.ipynb").write_text(json.dumps(dict(cells=[dict(cell_type="code", source="#| label: other\n1", outputs=[]), cell])))
    (tmp_path / "index.ipynb").write_text(json.dumps(dict(cells=[dict(cell_type="markdown", source="# T"), dict(cell_type="markdown", source="It is\n\n{{< embed book.ipynb#truth >}}\n\nindeed.")])))
    assert readme(tmp_path / "index.ipynb").endswith("It is\n\n**42**\n\nindeed.\n")
    (tmp_path / "index.ipynb").write_text(json.dumps(dict(cells=[dict(cell_type="markdown", source="{{< embed book.ipynb#other >}}")])))
    with pytest.raises(SystemExit, match="label other"): readme(tmp_path / "index.ipynb")


# --- package

def test_settings(settings):
    assert settings["lib_name"] == settings["lib_path"] == "cemiface" and settings["license"] == "apache2" and settings["min_python"] == "3.11"
    assert settings["version"] == cemiface.__version__ and f"## {cemiface.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert settings["readme_nb"] == "../README.md", "nbdev_docs would write a README.md with broken links; tests/readme.py makes it"
    assert settings["tst_flags"] == "notest" and settings["update_pyproject"] == "False" and "cell_number" not in settings
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


def test_requirements(settings):
    run, dev = ({r.name: r for r in map(Requirement, settings[k].split())} for k in ("requirements", "dev_requirements"))
    assert "2.13.0" in run["torch"].specifier and "2.10" not in run["torch"].specifier and "2.14" not in run["torch"].specifier
    assert {"nbdev", "execnb", "fastcore", "ghapi", "pytest"} <= set(dev) and not set(run) & set(dev)
    assert "2.4.14" in dev["nbdev"].specifier and "3.0" not in dev["nbdev"].specifier and "2.0" not in dev["fastcore"].specifier
    used = {o for p in MODULES for o in imported(p)} - set(sys.stdlib_module_names) - {"cemiface", "IPython"} # IPython is there wherever a notebook shows what `Finding` found
    extras = [Requirement(o).name for k in ("onnx_requirements", "align_requirements", "realism_requirements") for o in settings[k].split()]
    assert used <= {IMPORT_NAME.get(o, o) for o in [*run, *extras]}, "imported by the library, but not among its requirements"
    assert {o for o in run if IMPORT_NAME.get(o, o) not in used} == set(), "a requirement that the library does not import: drop it, or ask for it in development alone"
    elsewhere = {o for p in sorted((ROOT / "tests").glob("*.py")) for o in imported(p)} | {o for p in NOTEBOOKS for o in imported_by_cells(p)}
    own = {"cemiface", *(p.stem for p in (ROOT / "tests").glob("*.py"))}
    with_others = {"yaml", "packaging", "cloudpickle", "IPython", "matplotlib_inline"} # come with nbdev, pytest, submitit and jupyter
    assert elsewhere - set(sys.stdlib_module_names) - own - with_others <= {IMPORT_NAME.get(o, o) for o in [*run, *dev, *extras]}


def test_commands_exist(settings):
    name, target = settings["console_scripts"].split("=")
    module, attribute = target.split(":")
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert name == "cemiface" and path.exists()
    assert re.search(rf"^def {attribute}\(", path.read_text(), re.M)


def test_import_is_light():
    heavy = ["nbdev", "fastcore", "execnb", "IPython", "matplotlib.pyplot", "torch"]
    found = subprocess.run([sys.executable, "-c", f"import sys, cemiface; print([o for o in {heavy!r} if o in sys.modules])"],
                           capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert found.strip() == "[]"


def test_package_data():
    data = json.loads(importlib.resources.files("cemiface").joinpath("published.json").read_text(encoding="utf-8"))
    assert data["tables"] and data["errata"]
    folder = ROOT / "cemiface"
    code = (".py", ".pyc")
    there = {p for p in folder.rglob("*") if p.is_file() and p.suffix not in code}
    shipped = {*folder.glob("*.json"), *folder.glob("weights/**/*"), folder / "world/head.npz", folder / "world/HEAD_LICENSE.md"}
    assert there == {p for p in shipped if not p.is_dir() and p.suffix not in code}, "a data file that setup.py does not ship"


def test_ci_runs_the_readme():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK) and subprocess.run(["bash", "-n", script]).returncode == 0
    assert "grep -m1" in script.read_text() and "check_site.py" in script.read_text() and "nbdev_test" not in script.read_text(), "the test command stands in README.md alone"
