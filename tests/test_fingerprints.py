"Committed results are today's: the settings that they name are those that a run would be made with now."
import json, re

import pytest

from cemiface.paper.reproduce import fingerprint
from cemiface.study.study import Study
from readme import ROOT

LINE = re.compile(r"\*([\w, ]+): profile `([\w-]+)`, \d+ px, (\d+) seeds?, .*, settings `([0-9a-f]{8})`\*")
RESULT_NOTEBOOKS = sorted(p for p in (ROOT / "nbs/paper").glob("*.ipynb") if "found = shown(" in p.read_text(encoding="utf-8"))


def stamps(path): # names of results, profile, seeds, fingerprint: as the notebook's outputs say
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for out in cell.get("outputs", []):
            for names, profile, seeds, settings in LINE.findall("".join(out.get("data", {}).get("text/markdown", ""))):
                yield names.split(", "), profile, int(seeds), settings


def stale(names, profile, seeds, settings, tmp_path): return fingerprint(Study(profile, tmp_path, seeds), names) != settings


@pytest.mark.parametrize("path", RESULT_NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_results_are_of_todays_settings(path, tmp_path):
    found = list(stamps(path))
    assert found, f"{path.name} does not say which settings its results are of: execute it"
    old = [", ".join(s[0]) for s in found if stale(*s, tmp_path)]
    assert not old, f"{path.name} shows results of other settings than today's: make {'; '.join(old)} again"


def test_every_result_notebook_is_looked_at(): assert len(RESULT_NOTEBOOKS) == 8


def test_another_setting_is_another_fingerprint(tmp_path):
    usual = fingerprint(Study("laptop", tmp_path), ["table11"])
    other = Study("laptop", tmp_path)
    other.profile = other.profile.model_copy(update=dict(steps=11))
    assert fingerprint(other, ["table11"]) != usual
    assert stale(["table11"], "laptop", 3, usual, tmp_path) and not stale(["table11"], "laptop", 2, usual, tmp_path)
