"""One quantity, one value: every figure that a run's terminal, pages and JSON give for it is a rounding of the same."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest

from gradsift.explanation.relevance import AGGREGATIONS, Aggregation
from gradsift.validation.statistics import Agreement
from tiny_world import Cli, World, target_rows, write_rows

_NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?"


def plain(text: str) -> str:
    """With the signs and blanks of a keyboard."""
    return re.sub(r"\s+", " ", text.replace("\u2212", "-").replace("\u202f", " ").replace("\xa0", " ")).strip()


def is_rounded(shown: str, value: float) -> bool:
    """Whether a text is a number that the value rounds to, at the decimals that the text has."""
    share = r"(?: (?:error × [\d.,]+|[\d.,]+ ?%))?"  # said beside a relevance
    found = re.fullmatch(rf"({_NUMBER})( ?%| dB(?: \(cap\))?)?{share}", plain(shown))
    assert found, shown
    number = found[1].replace(",", "")
    wanted = 100 * value if (found[2] or "").strip() == "%" else value
    decimals = len(number.partition("e")[0].partition(".")[2])
    unit = 10.0 ** (int(number.partition("e")[2] or 0) - decimals)
    return abs(float(number) - wanted) <= unit / 2 * (1 + 1e-6) + 1e-12


def rows_of(source: str) -> Iterator[list[str]]:
    """The cells of every table row of a page."""
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", source, re.S):
        yield [text_of(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)]


def text_of(source: str) -> str:
    visible = re.sub(r"<(script|style|svg)\b.*?</\1>", " ", source, flags=re.S)
    return plain(html.unescape(re.sub(r"<[^>]+>", " ", visible)))


def lines_of(out: str) -> list[list[str]]:
    """The cells of a terminal's lines."""
    return [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]


def read(out: Path, name: str) -> Any:
    return json.loads((out / name).read_text())


def explained(tiny: World, name: str, out: Path, *options: object, target: str | None) -> tuple[Any, str]:
    """The JSON and the terminal's text of one run."""
    common = ("--adapter", tiny.adapters[-1], "--embedding", "none", "--compare", "-k", "1,3", *options)
    arguments = tiny.arguments("explain", out, *common, target=target)[1:]
    return json.loads(Cli(name, *arguments, "--json").succeeded().out), Cli(name, *arguments).succeeded().out


@pytest.mark.parametrize("how", get_args(Aggregation))
def test_relevance_of_one_output(tiny: World, how: Aggregation, tmp_path: Path) -> None:
    """Each strategy's dB in the heading, both tables, both pages and the JSON; a random one's, too, beside which each
    says how its draws became one."""
    asked = ("--prompt", "what colour is the cow", "--output", "it is red", "--over-outputs", how)
    found, out = explained(tiny, "explain", tmp_path, *asked, target=None)
    (entry,) = found["explanations"]
    said = plain(out)
    page = (tmp_path / "explanation.html").read_text()
    of_page = {cells[0].partition(f" {AGGREGATIONS[how]} over")[0]: cells[1:] for cells in rows_of(page)}
    of_terminal = {cells[0]: cells[1:] for cells in lines_of(out) if len(cells) == 4}
    report = (tmp_path / "report.html").read_text()
    of_report = {cells[0]: cells[1:] for cells in rows_of(report) if len(cells) > 2}
    table = pq.read_table(tmp_path / "explanations.parquet").to_pylist()
    of_table = {(row["strategy"], row["k"]): row for row in table}
    for result in entry["results"]:
        column, name = (1, 3).index(result["k"]), result["strategy"]
        value = result["relevance_db"]
        assert is_rounded(of_terminal[name][column], value)
        assert is_rounded(of_page[name][column], value)
        assert of_table[name, result["k"]]["relevance_db"] == value
        assert of_table[name, result["k"]]["aggregation"] == how == entry["aggregation"]
        (row,) = (row for row in found["relevance"]["rows"] if row["strategy"] == name)
        assert row["by_budget"][str(result["k"])]["db"] == pytest.approx(value, rel=1e-9)
        if result["k"] == 1:
            (shown,) = (cell for cell in of_report[name] if cell.endswith("dB"))
            assert is_rounded(shown, value)
    assert f"({AGGREGATIONS[how]} over 5 random draws)" in said
    assert text_of(page).count(f"{AGGREGATIONS[how]} over 5 draws") >= 1
    assert text_of(report).count(f"{AGGREGATIONS[how]} over 5 draws") == 1
    strategies = {result["strategy"]: result["relevance_db"] for result in entry["results"] if result["k"] == 1}
    headings = {name: re.search(rf" {re.escape(name)}: ({_NUMBER} dB)", said) for name in strategies}
    name = max((name for name, heading in headings.items() if heading), key=len)  # names end as others do
    assert is_rounded(headings[name][1], strategies[name])


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[pytest.mark.slow] * (how != "ratio_of_means")) for how in get_args(Aggregation)]
)
def test_relevance_over_outputs(tiny: World, how: Aggregation, tmp_path: Path) -> None:
    """The aggregate, the area under it, the share above 0 dB and what training does: terminal, page and JSON."""
    options = ("--over-outputs", how, "--use-answers", "--pages", 1, "--random-sets", 2)
    target = write_rows(tmp_path / "target.jsonl", target_rows(3))
    found, out = explained(tiny, "validate", tmp_path, *options, target=target)
    assert found["relevance"] == read(tmp_path, "relevance.json")
    assert found["relevance"]["how"] == how
    page = (tmp_path / "relevance.html").read_text()
    aggregates = {cells[0]: cells[1:] for cells in rows_of(page) if len(cells) == 6}
    of_terminal = {cells[0]: cells[1:] for cells in lines_of(out) if len(cells) == 6}
    assert len(found["relevance"]["rows"]) == 27
    for row in found["relevance"]["rows"]:
        name = row["strategy"]
        values = [row["by_budget"][k]["db"] for k in ("1", "3")]
        own = {k: [r["relevance_db"] for entry in found["explanations"] for r in entry["results"]
                   if (r["strategy"], r["k"]) == (name, k)] for k in (1, 3)}  # fmt: skip
        for shown in (of_terminal[name], aggregates[name]):
            assert all(is_rounded(text, value) for text, value in zip(shown, [*values, row["auc_db"]], strict=False))
            assert all(is_rounded(*end) for end in zip(shown[3].split(" to "), row["between"]["3"], strict=True))
            assert is_rounded(shown[4], row["above"]["3"])
        for k in (1, 3):
            assert row["by_budget"][str(k)]["count"] == 3
            assert row["above"][str(k)] == np.mean(np.array(own[k]) > 0)
            if how == "median_db":
                assert row["by_budget"][str(k)]["db"] == pytest.approx(np.median(own[k]))
    assert f"({AGGREGATIONS[how]} over 3 outputs and 5 random draws)" in plain(out)
    assert f"3 outputs ({AGGREGATIONS[how]}, over the draws of a random strategy as well)" in text_of(page)
    check_validation(read(tmp_path, "validation.json"), plain(out), page)


def check_validation(found: Any, said: str, page: str) -> None:
    """Correlations, shares and bins of validation.json on the terminal and on the page."""
    whole = found["agreement"]
    assert set(whole) == set(Agreement.__dataclass_fields__)
    for text in (said, text_of(page)):
        for name, first, second in (("support", "support", "support_above"), ("shift", "shift", "shift_above")):
            one = rf"({_NUMBER}) \(({_NUMBER}) to ({_NUMBER})\)"
            shown = re.search(rf"ρ\(relevance, {name}\):? {one} over all, {one} above 0 dB", text)
            assert shown
            wanted = [whole[part][figure] for part in (first, second) for figure in ("rho", "low", "high")]
            assert all(is_rounded(*figure) for figure in zip(shown.groups(), wanted, strict=True))
        shown = re.search(r"0 dB rule is right:? (\d+%) \((\d+%) to (\d+%)\)", text)
        assert shown
        for number, name in enumerate(("share", "low", "high"), 1):
            assert is_rounded(shown[number], whole["accuracy"][name])
    bins = [
        cells for cells in rows_of(page) if cells and re.fullmatch(r"(up to|above|.* to) .* dB|above .* dB", cells[0])
    ]
    wanted = [own for own in whole["bins"] if own["supported"]["count"]]
    assert len(bins) == len(wanted) > 1
    for cells, own in zip(bins, wanted, strict=True):
        edges = [float(edge) for edge in re.findall(_NUMBER, cells[0])]
        assert edges == [edge for edge in (own["low_db"], own["high_db"]) if edge is not None]
        assert cells[1] == str(own["supported"]["count"])
        shares = re.findall(r"\d+ ?%", cells[2])
        assert all(map(is_rounded, shares, (own["supported"][name] for name in ("share", "low", "high"))))
        assert len(shares) == 3
        assert is_rounded(cells[3], own["correct"]["share"])


def test_a_choice_by_rewards(tiny: World, tmp_path: Path) -> None:
    """Scores, ranks, shares of new rankings, sentences, groups, tokens, rewards and what was left out."""
    file = tmp_path / "letters.py"
    file.write_text(
        "def letters(completions, **columns):\n    return [float(len(set(c)) > 6) * len(c) for c in completions]\n"
    )
    pool = write_rows(
        tmp_path / "pool.jsonl", [*map(json.loads, Path(tiny.pool).read_text().splitlines()), {"id": "bad"}]
    )
    options = (*tiny.with_adapters(), "--budget", 6, "--estimator", "nice", "--reward",
               f"{file}:letters", "--samples", "8", "--max-new-tokens", "6")  # fmt: skip
    out = tmp_path / "run"
    found = tiny("select", out, *options, "--json", pool=pool).succeeded().json
    terminal = tiny("select", out, *options, pool=pool).succeeded().out
    said, page = plain(terminal), (out / "report.html").read_text()
    shown = text_of(page)
    chosen = found["selections"][0]
    diagnostics = read(out, "diagnostics.json")
    assert read(out, "summary.json") | {"seconds": None} == found | {"seconds": None}

    rows = [json.loads(line) for line in (out / "selected.jsonl").read_text().splitlines()]
    table = {row["id"]: row for row in pq.read_table(out / "scores.parquet").to_pylist()
             if (row["target"], row["method"]) == ("*", chosen["estimator"])}  # fmt: skip
    of_terminal = {cells[5]: cells for cells in lines_of(terminal) if len(cells) == 8}
    for place, id_ in enumerate(chosen["ids"]):
        value = chosen["scores"][place]
        kept = [chosen["kept"][over][place] for over in ("samples", "targets")]
        assert (rows[place]["gradsift_id"], rows[place]["gradsift_score"]) == (id_, pytest.approx(value))
        assert table[id_]["score"] == pytest.approx(value)
        assert table[id_]["rank"] == rows[place]["gradsift_rank"]
        rank, score, tokens, *again = of_terminal[id_][:5]
        assert (rank, tokens) == (str(table[id_]["rank"]), str(table[id_]["tokens"]))
        assert is_rounded(score, value)
        assert all(is_rounded(text, share) for text, share in zip(again, kept, strict=True))
        assert [diagnostics["kept"][over][id_] for over in ("samples", "targets")] == kept
        own = re.search(
            rf"rank (\d+) score ({_NUMBER}) supervised tokens (\d+) again with new samples (\d+ %) "
            rf"again with new targets (\d+ %) id {id_} ", shown
        )  # fmt: skip
        assert own
        assert (own[1], own[3]) == (str(table[id_]["rank"]), str(table[id_]["tokens"]))
        assert all(is_rounded(text, v) for text, v in zip((own[2], own[4], own[5]), [value, *kept], strict=True))
    total = re.search(r"chose 6 of 24 examples \((\d+) supervised tokens", shown)
    assert total
    assert int(total[1]) == sum(table[id_]["tokens"] for id_ in chosen["ids"])

    assert found["reliability"] == diagnostics["reliability"]
    for one in found["reliability"]:
        sentence = one["words"][1:]
        assert sentence in said
        assert sentence in shown
    check_shares(found, terminal, page)
    check_rewards(diagnostics, terminal, page)

    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    left_out = [entry for entry in skipped if entry["left_out"] == "row"]
    assert sum(found["skipped"].values()) == len(left_out) == 1
    assert "1 row left out" in said
    assert found["pool"]["rows"] == 24
    assert "pool.jsonl (25 rows, 1 skipped): 24 used" in shown


def check_shares(found: Any, terminal: str, page: str) -> None:
    """How much of the choice has each value of a column."""
    tables = list(rows_of(page))
    lines = {cells[0]: cells[2:] for cells in lines_of(terminal) if len(cells) == 2 + len(found["selections"])}
    for number, chosen in enumerate(found["selections"]):
        for counts in chosen["shares"].values():
            total = sum(counts.values())
            assert total == len(chosen["ids"])
            for value, count in counts.items():
                assert is_rounded(lines[value][number], count / total)
                percents = [p for cells in tables if cells[:1] == [value] for p in re.findall(r"[\d.]+ %", str(cells))]
                assert any(is_rounded(percent, count / total) for percent in percents)


def check_rewards(diagnostics: Any, terminal: str, page: str) -> None:
    """What responses earned at each checkpoint: the same responses everywhere."""
    names = [Path(entry["rewards"]["checkpoint"]).name for entry in diagnostics["checkpoints"]]
    notes = r" (with a reward|standard deviation.*|all responses.*|at the.*|mean|gradients.*|with the.*)$"
    tables = [cells for cells in rows_of(page) if len(cells) == 1 + len(names)]
    of_page = {re.sub(notes, "", cells[0]): cells[1:] for cells in tables}
    of_terminal = {cells[0]: cells[1:] for cells in lines_of(terminal) if len(cells) == 1 + len(names)}
    for number, (name, entry) in enumerate(zip(names, diagnostics["checkpoints"], strict=True)):
        earned = entry["rewards"]
        halves = [value for value in entry["half_cosine"] if value is not None]
        silent = f"{len(earned['no_signal'])} of {earned['prompts']}"
        assert name in plain(terminal)
        cosine = of_terminal["cosine of halves"][number]
        assert is_rounded(cosine, float(np.median(halves))) if halves else cosine == "undefined"
        for shown in (of_page, of_terminal):
            assert next(own for row, own in shown.items() if row.startswith("responses"))[number] == str(
                earned["responses"]
            )
            assert shown["prompts without signal"][number] == silent
            assert is_rounded(shown["mean reward"][number], earned["mean"])
            assert is_rounded(shown["spread within a prompt"][number], earned["within"])
        for row, value in (("mean reward", earned["mean"]), ("spread within a prompt", earned["within"]),
                           ("responses cut off", earned["cut_off"]), ("rewards above 0", earned["positive"]),
                           ("mean tokens of a response", earned["tokens"])):  # fmt: skip
            assert is_rounded(of_page[row][number], value), row
        same = round(earned["constant"] * earned["prompts"])
        assert of_page["prompts where all earn the same"][number] == f"{same} of {earned['prompts']}"


def test_scores(tiny: World, tmp_path: Path) -> None:
    """Counts, highest scores and rank correlations with length."""
    options = (*tiny.with_adapters(), "--estimator", "bm25")
    found = tiny("score", tmp_path, *options, "--json").succeeded().json
    out = tiny("score", tmp_path, *options).succeeded().out
    of_terminal = {cells[0]: cells[1:] for cells in lines_of(out) if len(cells) == 5}
    table = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    for method in found["methods"]:
        own = [row for row in table if (row["target"], row["method"]) == ("*", method["method"])]
        best = next(row for row in own if row["rank"] == 1)
        shown = of_terminal[method["method"]]
        assert (shown[0], shown[1]) == (str(method["scored"]), best["id"])
        assert method["scored"] == len(own)
        assert is_rounded(shown[2], best["score"])
        assert is_rounded(shown[3], method["length_correlation"])
