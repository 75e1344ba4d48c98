from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from fake_run import DOMAINS, fake_run

from moeprune.errors import MoepruneError
from moeprune.report import atlas, intervals, measurements, removals, wording
from moeprune.report.html import render_report

VOID = {"meta", "link", "img"}


class Outline(HTMLParser):
    """The structure of a page: tables, headings, links, ids; complains about unbalanced tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[str]] = []
        self.headings: list[int] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        self.links += [given[k] or "" for k in ("src", "href", "action", "data") if k in given]
        self.ids += [given["id"] or ""] if "id" in given else []
        if tag == "table":
            self.tables.append([])
        elif self.tables and "table" in self.open:
            self.tables[-1].append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # HTML ignores the slash of <circle ... />; SVG within HTML does not
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).replace(wording.THIN, " ").split())


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(fake_run())


@pytest.fixture(scope="module")
def outline(page: str) -> Outline:
    return Outline(page)


def test_the_page_stands_alone_and_is_small(page: str, outline: Outline) -> None:
    assert page.startswith("<!DOCTYPE html>")
    assert len(page.encode()) < 1_000_000
    assert outline.links and all(link.startswith("#") for link in outline.links)
    assert not re.search(r"https?:|url\(|@import|(src|href)=[\"']?//", page)
    assert not {"link", "img", "iframe"} & {tag for tag, _ in outline.tags}


def test_only_our_own_scripts_may_run(page: str, outline: Outline) -> None:
    [policy] = [g["content"] for t, g in outline.tags if t == "meta" and "http-equiv" in g]
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_links_lead_somewhere_and_ids_are_unique(outline: Outline) -> None:
    assert len(outline.ids) == len(set(outline.ids))
    assert {link[1:] for link in outline.links} <= set(outline.ids)
    labels = [
        name for _, given in outline.tags for name in (given.get("aria-labelledby") or "").split()
    ]
    assert set(labels) <= set(outline.ids)


def test_tables_have_captions_and_every_header_a_scope(outline: Outline) -> None:
    assert len(outline.tables) == 2 + 1 + 1 + 4 + 2
    captions = [tags[0] == "caption" for tags in outline.tables]
    assert captions.count(False) == 1  # the grid has a label
    scopes = [given.get("scope") for tag, given in outline.tags if tag == "th"]
    assert set(scopes) == {"row", "col"}


def test_headings_descend_one_level_at_a_time(outline: Outline) -> None:
    assert outline.headings[0] == 1 and outline.headings.count(1) == 1
    steps = zip(outline.headings, outline.headings[1:], strict=False)
    assert all(below <= above + 1 for above, below in steps)


def test_both_colour_schemes_and_paper_are_styled(page: str) -> None:
    assert "color-scheme: light dark" in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_the_numbers_stand_in_the_table(outline: Outline) -> None:
    words = outline.words
    for shown in ("12.7 M", "25.4 MB", "14.0 MB", "of 192", "55 %", "410 MB", "3.3 s", "0.0208"):
        assert shown in words, shown
    for domain in DOMAINS:
        assert domain in words
    assert "perplexity ×1.36" in words
    assert "moeprune demo --out demo-out" in words and "ab12" * 16 in words and "2.13.0" in words
    assert "score=fusion, novice=mean, beta=0.5" in words


def test_the_worst_domain_is_named_not_only_coloured(outline: Outline) -> None:
    worst = [given for tag, given in outline.tags if given.get("class") == "worst"]
    assert len(worst) == 7
    assert outline.words.count("worst domain of this row") == 7
    rows = measurements.table(fake_run()).rows
    assert [entry.worst for entry in rows[1].perplexity] == [d == "code" for d in DOMAINS]
    assert not any(entry.worst for entry in rows[0].perplexity)


def test_warnings_come_before_the_results_and_name_their_row(page: str, outline: Outline) -> None:
    assert page.index("do not draw conclusions") < page.index('id="results"')
    assert "moeits-50: layer 3: 4 of the kept experts" in outline.words
    quiet = fake_run()
    quiet["warnings"] = quiet["rows"][4]["warnings"] = []
    assert 'class="warnings"' not in render_report(quiet)


def test_one_warning_about_two_rows_is_printed_once() -> None:
    run = fake_run()
    run["rows"][1]["warnings"] = list(run["rows"][4]["warnings"])
    words = Outline(render_report(run)).words
    assert words.count("fewer than 100 calibration tokens") == 1
    assert "mone-25, moeits-50: layer 3" in words


def test_every_expert_has_a_cell_that_can_be_read_aloud(page: str) -> None:
    cells = re.findall(r'<td class="c\d+"><i>([^<]+)</i></td>', page)
    assert len(cells) == 6 * 32 and all(cell.endswith("%") for cell in cells)


def test_the_atlas_knows_the_fate_and_score_of_every_expert() -> None:
    run = fake_run()
    run["rows"][2]["plan"]["1"]["merged"] = {"7": [3, 4]}
    drawn = atlas.payload(run)
    assert drawn is not None and drawn["layers"] == list(range(6))
    fates = "".join(letter for row in drawn["rows"] for line in row["fates"] for letter in line)
    assert fates.count("n") == 6 * (8 + 16) and fates.count("d") >= 6 * (8 + 16) - 1
    assert drawn["rows"][1]["fates"][1][7] == "m" and drawn["rows"][1]["into"][1] == {"7": [3, 4]}
    first = run["rows"][1]["plan"]["0"]["scores"]["fusion"]
    assert drawn["rows"][0]["scores"]["fusion"][0] == pytest.approx(first, rel=1e-3)
    assert drawn["typical"][0][0][0] == [0, 40, 5.5] and drawn["tokens"][0] == "␣und"


def test_texts_of_the_run_cannot_end_the_script(page: str) -> None:
    run = fake_run()
    evil = "</script><script>alert(1)</script>\u2028<!--&"
    run["atlas"]["tokens"][0] = run["atlas"]["domains"][0] = run["rows"][1]["name"] = evil
    page = render_report(run)
    assert "<script>alert" not in page and page.count("</script>") == 3
    held = page.partition('id="atlas-data">')[2].partition("</script>")[0]
    assert json.loads(held)["domains"][0] == evil
    assert json.loads(held)["tokens"][0] == atlas.visible(evil)


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" der", "␣der"),
        ("\n\t", "↵⇥"),
        ("\u202ea", "\\u202ea"),
        ("ф", "ф"),
        ("\x00", "\\u0000"),
    ],
)
def test_tokens_are_made_visible(token: str, shown: str) -> None:
    assert atlas.visible(token) == shown


def test_intervals_are_drawn_where_there_are_any() -> None:
    run = fake_run()
    loss = {"value": 0.031, "low": 0.024, "high": 0.038, "level": 0.95, "items": 9, "method": "x"}
    agreement = {**loss, "value": 0.95, "low": 0.941, "high": 0.9612}
    every = {"loss": loss, "kl": loss, "agreement": agreement, "verdict": "lost <something>"}
    run["rows"][1]["against"] = {
        "code": {"loss": loss, "verdict": "worse <beyond> chance"}, "all": every,
    }  # fmt: skip
    score = {**loss, "value": 0.5, "difference": {**loss, "value": -0.25}, "verdict": "n too small"}
    run["rows"][1]["tasks"] = {"blimp": {**score, "metrics": {"acc": {"value": 0.5}}}}
    cell = {"model": score, "teacher": {**loss, "value": 0.375}, "against": loss, "verdict": "so"}
    run["rows"][1]["generation"] = {
        "prompts": 10, "decodings": [{"name": "greedy", "measures": {"never_ended": cell}}],
    }  # fmt: skip
    run["rows"][1]["efficiency"] = {
        "models": {"model": {"disk_bytes": 14e6}, "teacher": {"decode_tokens_per_second": 50}},
        "machine": {"cores": 2},
    }
    run["rows"][1]["findings"] = ["code lost <more>"]
    page = render_report(run)
    words = Outline(page).words.replace("\N{NO-BREAK SPACE}", " ")
    assert " +0.031 [0.024, 0.038]" in words and "worse &lt;beyond&gt; chance" in page
    assert "0.0208 [0.024, 0.038]" in words and "[94.1, 96.1] %" in words
    assert "mone-25: lost <something>" in words and "holds no intervals" not in words
    assert "0.500 [0.0240, 0.0380] −0.25 [0.024, 0.038]" in words and "n too small" in page
    assert "mone-25: code lost <more>" in words
    never = "greedy · never-ended0.500 [0.0240, 0.0380] +0.031 [0.024, 0.038]0.375"
    assert never in words and "original, beside mone-25" in words and 'title="so"' in page
    assert "on disk14.0 MB– decode, tokens per second–50.0" in words and "machine" not in words
    assert intervals.interval({"value": None}) == "" and intervals.signed(None) == wording.NOTHING


def test_routing_before_and_after(outline: Outline) -> None:
    assert "Routing before and after" in outline.words
    assert "20.5 of 32" in outline.words and "measured on 6 144 tokens" in outline.words.lower()


def test_what_was_removed_adds_up_the_usage() -> None:
    run = fake_run()
    row = run["rows"][1]
    lines = removals.removals(row, run)
    removed = row["plan"]["0"]["replaced"]
    assert lines[0].share == wording.percent(sum(run["usage"]["0"][e] for e in removed))
    assert lines[0].novices == wording.ids(removed) and lines[0].dropped == wording.NOTHING
    assert lines[-1].layer == "all" and lines[-1].novices == "48 experts"
    assert lines[-1].even == wording.percent(0.25)
    row["plan"] = {  # layers of 4 and of 12 experts: 4 of 16, not the mean of a half and a sixth
        "0": {"keep": [0, 1], "replaced": [], "dropped": [2, 3]},
        "1": {"keep": list(range(10)), "replaced": [], "dropped": [10, 11]},
    }
    assert removals.removals(row, run)[-1].even == wording.percent(0.25)


def test_what_was_not_counted_is_no_choice() -> None:
    run = fake_run()
    run["usage"] = run["atlas"] = None
    drawn = atlas.payload(run)
    assert drawn is not None
    assert [group for group, _ in atlas.choices(drawn)] == [
        f"scores of {method}-{size}" for size in (25, 50) for method in ("mone", "moeits")
    ]


def test_layers_are_sorted_as_numbers() -> None:
    drawn = atlas.payload(fake_run(layers=12))
    assert drawn is not None
    assert [row.layer for row in atlas.grid(drawn).rows] == list(range(12))


def test_a_plan_that_removes_nothing_says_so(outline: Outline) -> None:
    assert "Every expert stays; 27.0 % of the model's parameters are zero." in outline.words


def test_names_are_escaped() -> None:
    evil = "<script>alert(1)</script>\"'><img src=x>"
    run = fake_run()
    run["model"]["name"] = run["rows"][1]["name"] = run["command"] = evil
    run["warnings"] = [evil]
    run["rows"][1]["plan"]["0"]["scores"] = {evil: [0.5] * 32}
    run["rows"][1]["plan"]["0"]["notes"] = [evil]
    for row in run["rows"]:
        row["perplexity"][evil] = 3.0
    page = render_report(run)
    assert "<script>alert" not in page and "<img" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    Outline(page)


def _sparse_run() -> dict[str, Any]:
    run = fake_run()
    run["calibration"] = run["usage"] = run["atlas"] = None
    for row in run["rows"]:
        row["kl"] = row["agreement"] = row["peak_memory_bytes"] = row["plan"] = None
    return run


def test_unknown_measurements_are_dashes() -> None:
    run = _sparse_run()
    words = Outline(render_report(run)).words
    assert "without calibration data" in words
    assert "No usage was recorded" in words and "carries no plan" in words
    assert words.count(wording.NOTHING) > 7 * 3


def test_absent_keys_are_the_same_as_null() -> None:
    absent = _sparse_run()
    for key in ("calibration", "usage", "atlas"):
        del absent[key]
    for row in absent["rows"]:
        for key in ("kl", "agreement", "peak_memory_bytes", "plan"):
            del row[key]
    assert render_report(absent) == render_report(_sparse_run())


def test_oddities_do_not_crash() -> None:
    run = fake_run()
    run["rows"][1]["perplexity"] = {"english": None, "code": math.nan, "german": math.inf}
    run["rows"][2]["perplexity"] = {}
    run["rows"][3]["bytes"] = None
    run["rows"][3]["plan"]["1"]["scores"] = {"fusion": [None] * 32, "second": [1.0]}
    run["rows"][4]["plan"]["1"]["keep"] = []
    run["rows"][5]["seconds"] = {}
    run["usage"]["1"] = [0.5, None]
    run["seed"] = run["rows"][1]["seed"] = 7
    outline = Outline(render_report(run))
    assert "Not drawn, because a size or a perplexity is unknown: mone-25, moeits-25, mone-50." in (
        outline.words
    )
    assert "∞" in outline.words and "seed=7" in outline.words


def test_only_the_unpruned_model() -> None:
    run = fake_run()
    run["rows"] = run["rows"][:1]
    words = Outline(render_report(run)).words
    assert "This run measured demo" in words and "Nothing was pruned" in words


def test_without_the_unpruned_model_no_ratio_is_claimed() -> None:
    run = fake_run()
    run["rows"] = run["rows"][1:]
    page = render_report(run)
    assert 'class="worst"' not in page and "<svg" not in page


def test_the_input_is_left_alone_and_the_page_is_reproducible() -> None:
    run = fake_run()
    before = copy.deepcopy(run)
    assert render_report(run) == render_report(json.loads(json.dumps(run)))
    assert run == before


@pytest.mark.parametrize("key", ["command", "model", "rows", "warnings", "versions", "seconds"])
def test_a_missing_key_of_the_run_is_named(key: str) -> None:
    run = fake_run()
    del run[key]
    with pytest.raises(MoepruneError, match=f"'{key}' is missing"):
        render_report(run)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (("model",), "experts"),
        (("model",), "fingerprint"),
        (("rows", 1), "perplexity"),
        (("rows", 2), "bytes"),
        (("rows", 1, "plan", "3"), "dropped"),
    ],
)
def test_a_missing_key_further_in_is_named_with_its_place(path: tuple[Any, ...], key: str) -> None:
    run = fake_run()
    inner: Any = run
    for step in path:
        inner = inner[step]
    del inner[key]
    with pytest.raises(MoepruneError, match=f"{path[0]}.*'{key}' is missing"):
        render_report(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "moeprune.run/2"}, "'format' is not"),
        ({"rows": []}, "'rows' is empty"),
        ({"rows": ["x"]}, r"rows\[0\] is not an object"),
        ({"rows": "x"}, "'rows' may not be str"),
        ({"usage": {"x": []}}, "not a layer index"),
        ({"usage": {"0": 1.0}}, "not a list"),
        ({"atlas": []}, "atlas is not an object"),
        ({"atlas": {"layers": {"0": {"count": ["x"]}}}}, "layers.0 does not hold"),
        ({"atlas": {"domains": ["a"], "layers": {"0": {"domains": [[1, 2]]}}}}, "does not hold"),
        ({"atlas": {"tokens": ["a"], "layers": {"0": {"tokens": [[[1, 2, 3]]]}}}}, "does not hold"),
        ({"atlas": {"routing": {"rows": {"a": []}}}}, "'a' is not an object"),
    ],
)
def test_malformed_runs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MoepruneError, match=message):
        render_report(fake_run() | change)


def test_a_plan_with_an_impossible_expert_is_refused() -> None:
    run = fake_run()
    run["rows"][1]["plan"]["0"]["keep"] = [10**9]
    with pytest.raises(MoepruneError, match="'keep' is not a list of ids below 32"):
        render_report(run)
