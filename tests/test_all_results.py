"""All of the paper on one command, at the smallest profile: every result comes out whole, beside its published numbers, and a second run finds everything made."""
import re, subprocess, sys

import pandas as pd
import pytest

from cemiface.study.study import Study
from cemiface.paper.published import published_names
from cemiface.paper.reproduce import RESULTS, list_results, make_once, shared_cache

TABLES = [f"table{i}" for i in range(1, 15)] + ["table_pretrained_loss"]
FIGURES = [f"figure{i}" for i in range(1, 10)]
COMMAND = [sys.executable, "-m", "cemiface", "reproduce", "--all", "--profile", "smoke", "--jobs", "2"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory): # folder, what the command said
    out = tmp_path_factory.mktemp("all")
    make_once(list(RESULTS.values()), Study("smoke", out, 2), Study("smoke", shared_cache(), 2), make=False) # what notebooks have made need not be made again
    ran = subprocess.run([*COMMAND, "--out", str(out)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return out, ran.stdout + ran.stderr


def test_fifteen_tables_and_nine_figures_are_results():
    assert {*TABLES, *FIGURES, "dynamics", "claims"} <= set(RESULTS)
    assert set(TABLES) <= set(published_names())


@pytest.mark.parametrize("name", TABLES)
def test_every_table_stands_beside_what_was_published(made, name):
    table = pd.read_csv(made[0]/"smoke/tables"/f"{name}.csv")
    assert len(table)
    measured = table.select_dtypes("number").dropna(axis=1, how="all")
    assert any("published" in c for c in table.columns) or "published" in set(table.get("source", [])), table.columns
    assert measured.shape[1] >= 2
    assert (made[0]/"smoke/tables"/f"{name}.md").read_text().startswith("| ")


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_a_picture(made, name):
    assert (made[0]/"smoke/figures"/f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_page_shows_all_and_says_what_each_is_made_of(made):
    page = (made[0]/"smoke/index.html").read_text()
    assert "Not made" not in page and page.count("<h2 id=") == len(RESULTS)
    assert page.index('id="claims"') < page.index('id="table1"') and "not made yet" not in page
    assert re.search(r"made of \d+ artifacts", page)


def test_nothing_is_left_to_do(made):
    said = list_results(Study("smoke", made[0], 2))
    assert all(" made " in line for line in said.splitlines()), said
    again = subprocess.run([*COMMAND, "--dry-run", "--out", str(made[0])], capture_output=True, text=True)
    assert "to do" not in again.stdout + again.stderr


def test_every_claim_has_a_verdict(made):
    claims = pd.read_csv(made[0]/"smoke/tables/claims.csv")
    assert set(claims.verdict) <= {"holds", "does not hold", "not separable at this size"}
    assert claims.measured.str.contains(" ± ").all()
