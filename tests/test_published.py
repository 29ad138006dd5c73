"Published numbers against a few copied by hand, and sums against plain Python."
import json
from importlib.resources import files

import pandas as pd
import pytest

from cemiface.paper.published import beside, errata, published, published_names, recompute, trusted

BOOK = json.loads(files("cemiface").joinpath("published.json").read_text(encoding="utf-8"))
FIVE = ["LFW", "CFP-FP", "AgeDB", "CALFW", "CPLFW"]


@pytest.mark.parametrize("name,where,column,value", [
    ("table1", {"sim": .76}, "AVG", 91.78), ("table1", {"sim": .85}, "CFP-FP", 85.67), ("table1", {"sim": .53}, "CPLFW", 77.3),
    ("table3", {"generation_m": "{0,1}"}, "AVG", 89.57), ("table4", {"training_data": "VGGFace2", "inquiry_data": "DDPM"}, "AVG", 92.01),
    ("table6", {"method": "CemiFace", "volume_M": 1.2}, "AVG", 93.22), ("table6", {"method": "DCFace+", "volume_M": .5}, "GtR", 4.08),
    ("table7", {"method": "CemiFace"}, "avg_sim", 28.54), ("table9", {"avg_sim": .70}, "avg_lowest_sim", .676),
    ("table10", {"backbone": "IR-SE-100"}, "AVG", 91.82), ("table11", {"m": 0}, "AVG", 89.567), ("table11", {"m": -.5}, "LFW", 85.18),
    ("table12", {"method": "DCFace"}, "FID", 15.82), ("table14", {"lambda": .5}, "AVG", 90.77), ("dynamics", {"m": 0}, "epochs_to_best_AVG", 38),
])
def test_value(name, where, column, value):
    df = published(name)
    for k, v in where.items(): df = df[df[k] == v]
    assert df[column].item() == value


def test_every_table_opens():
    assert published_names() == list(BOOK["tables"]) and len(published_names()) == 17
    for name, table in BOOK["tables"].items():
        df = published(name)
        assert df.shape == (len(table["rows"]), len(table["columns"])) and df.columns.is_unique
        assert df.attrs["name"] == name and df.attrs["caption"] and df.attrs["section"]


def test_tables_are_fresh_copies():
    df = published("table1")
    df.loc[0, "AVG"] = 0
    errata().clear()
    assert published("table1").AVG[0] == 89.48 and errata()


def test_unknown_table_lists_the_known():
    with pytest.raises(ValueError, match="'table15'.*table1, table2"): published("table15")


def test_errata_by_table():
    assert errata("table11") == [o for o in errata() if o.startswith("Table 11")] and len(errata("table11")) == 1
    assert errata("table1") == [] and errata("dynamics") == [] and published("table9").attrs["errata"] == errata("table9")


def test_trusted_drops_the_slips_alone():
    printed, clean = published("table11"), trusted("table11")
    gone = clean.isna() & printed.notna()
    assert gone.loc[printed.m == .8, FIVE + ["AVG"]].all(axis=None) and gone.to_numpy().sum() == 6
    assert trusted("table9")["avg_largest_sim"].isna().tolist() == [False] * 4 + [True]
    pd.testing.assert_frame_equal(trusted("table6"), published("table6"))


def test_recompute_against_plain_python():
    avg, gtr = {}, {}
    for name, table in BOOK["tables"].items():
        for i, row in enumerate(dict(zip(table["columns"], r)) for r in table["rows"]):
            if all(row.get(b) is not None for b in FIVE): avg[name, i] = (row["AVG"], sum(row[b] for b in FIVE) / 5)
            if row.get("GtR") is not None: gtr[name, i] = (row["GtR"], 94.26 - row["AVG"])
    checks = recompute()
    for figure, expected in (("AVG", avg), ("GtR", gtr)):
        got = checks[checks.figure == figure]
        assert list(got.table) == [k[0] for k in expected]
        assert list(got.published) == [v[0] for v in expected.values()]
        assert list(got.recomputed) == pytest.approx([v[1] for v in expected.values()], abs=1e-9)
    assert checks.agrees.all() and (checks.difference.abs() <= .01).all()


def test_recompute_finds_a_wrong_sum(monkeypatch):
    book = json.loads(json.dumps(BOOK))
    book["tables"]["table1"]["rows"][2][-1] += .02
    monkeypatch.setattr("cemiface.paper.published._book", lambda: book)
    wrong = recompute().query("not agrees")
    assert list(wrong.table) == ["table1"] and wrong.row.item() == "0.76" and wrong.difference.item() == pytest.approx(91.782 - 91.80)


@pytest.fixture
def measured(): return pd.DataFrame({"m": [0., 1., 0., .7], "proc-LFW": [80., 70., 82., 75.], "AVG": [60., 50., 62., 55.], "seed": [0, 0, 1, 0]})


def test_beside_keeps_order_and_repeats(measured):
    both = beside(measured, "table11", on="m")
    assert list(both.columns) == ["m", *(f"{c}{s}" for c in ("proc-LFW", "AVG") for s in ("", " published", " difference"))]
    assert both["proc-LFW published"].tolist() == [98.1, 97., 98.1, 97.2]
    assert both["AVG difference"].tolist() == pytest.approx([60 - 89.567, 50 - 84.126, 62 - 89.567, 55 - 85.11])


def test_beside_chooses_columns(measured):
    assert list(beside(measured, "table11", "m", ["AVG"]).columns) == ["m", "AVG", "AVG published", "AVG difference"]
    assert beside(measured, "table11", "m", {"AVG": "LFW"})["AVG published"].tolist() == [98.1, 97., 98.1, 97.2]


def test_beside_several_keys():
    mine = pd.DataFrame({"method": ["DCFace", "CemiFace"], "volume_M": [1.2, .5], "AVG": [1., 2.]}, index=[7, 3])
    assert beside(mine, "table6", ["method", "volume_M"])["AVG published"].tolist() == [91.21, 92.3]


def test_beside_leaves_unknown_rows_empty():
    both = beside(pd.DataFrame({"m": [.55, .8], "AVG": [1., 2.]}), "table11", "m")
    assert both["AVG published"].isna().all() and both["AVG difference"].isna().all() and both.AVG.tolist() == [1., 2.]


@pytest.mark.parametrize("name,on,columns,says", [("table11", "margin", None, "margin"), ("table11", "m", ["FID"], "measured column 'FID'"),
                                                  ("table12", "m", ["AVG"], "published column 'm'"), ("table11", "m", {"AVG": "FID"}, "published column 'FID'")])
def test_beside_says_what_is_lacking(measured, name, on, columns, says):
    with pytest.raises(ValueError, match=says): beside(measured, name, on, columns)


def test_beside_refuses_an_ambiguous_key():
    with pytest.raises(ValueError, match="several published rows"): beside(pd.DataFrame({"method": ["CemiFace"], "AVG": [1.]}), "table6", "method")
    assert beside(pd.DataFrame({"method": ["SynFace"], "AVG": [1.]}), "table6", "method")["AVG published"].item() == 74.75
