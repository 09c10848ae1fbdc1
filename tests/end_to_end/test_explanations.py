"""`explain` and `validate` as a user types them: what they write, what they keep, and what does not stop them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import gradsift.explanation.explain as explain_module
import gradsift.validation.validate as validate_module
from gradsift.explanation.explain import ALL_STRATEGIES
from gradsift.model import embeddings, models
from tiny_world import Cli, World, pool_rows, target_rows, without, write_rows

EVIL = "<script>alert(1)</script>"
EVIL_ID = '"><img src=x onerror=alert(2)>'
ASKED = [
    {"id": "t0", "prompt": f"say {EVIL}", "completion": f"{EVIL}</script>"},
    {"id": "../up", "prompt": "what says the cow", "completion": "it says cowcow"},
    {"id": "<b>T2", "prompt": "what colour is the dog", "completion": "the dog is blue"},
]


def command(tiny: World, name: str, out: Path, *options: object, **replaced: object) -> Cli:
    """`explain` or `validate` at the last of the tiny world's checkpoints, without a map of meanings."""
    common = (*without(("--embedding", "none", "--max-new-tokens", "4"), options), *options)
    return Cli(name, *tiny.arguments("explain", out, "--adapter", tiny.adapters[-1], *common, **replaced)[1:])


def explained(tiny: World, out: Path, *options: object, **replaced: object) -> Any:
    return strictly(command(tiny, "explain", out, "--json", *options, **replaced))


def strictly(result: Cli) -> Any:
    """What `--json` printed, which holds no NaN or infinity: other programs would refuse them."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(result.succeeded().out, parse_constant=refuse)


def out_of_reach(*_: object, **__: object) -> None:
    raise AssertionError("this was done already")


@pytest.fixture(scope="module")
def hostile(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A pool and a target whose ids, texts and columns are HTML."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = pool_rows()
    rows[2]["messages"][0]["content"] = f"what colour {EVIL} is the dog 2"
    rows[2]["source"] = EVIL
    rows[3]["id"] = EVIL_ID
    rows[4]["messages"][1]["content"] = EVIL
    return World(folder, tiny.model, write_rows(folder / "pool.jsonl", rows), write_rows(folder / "asks.jsonl", ASKED))


@pytest.fixture(scope="module")
def asked(tiny: World, hostile: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run folder after `explain --target`, and what it printed."""
    out = tmp_path_factory.mktemp("asked") / "run"
    options = ("--use-answers", "-k", "1,3", "--pages", 2)
    return out, explained(tiny, out, *options, pool=hostile.pool, target=hostile.target)


def test_all_files_say_what_was_printed(asked: tuple[Path, Any]) -> None:
    """The JSON, explanations.jsonl, explanations.parquet and relevance.json hold the same results, one for each
    output, strategy and k; relevance is ‖g‖² over the squared error, aggregated as the ratio of their sums."""
    out, printed = asked
    lines = [json.loads(line) for line in (out / "explanations.jsonl").read_text().splitlines()]
    assert len({tuple(line.pop("made").values()) for line in lines}) == 1
    assert lines == printed["explanations"]
    assert [(line["id"], line["output"]) for line in lines] == [(row["id"], row["completion"]) for row in ASKED]
    assert json.loads((out / "relevance.json").read_text()) == printed["relevance"]
    assert set(printed["files"]) == {"explanations.jsonl", "explanations.parquet", "relevance.json", "skipped.jsonl",
                                     "relevance.html", "report.html"}  # fmt: skip
    assert all(Path(path).is_file() for path in printed["files"].values())
    rows = pq.read_table(out / "explanations.parquet").to_pylist()
    assert len(rows) == len(ASKED) * 2 * 2
    assert len({(row["output"], row["strategy"], row["k"]) for row in rows}) == len(rows)
    found = [(line, result) for line in lines for result in line["results"]]
    for row, (line, result) in zip(rows, found, strict=True):
        shared = ("estimator", "strategy", "k", "relevance_db", "ratio", "near_zero", "capped")
        assert [row[name] for name in shared] == [result[name] for name in shared]
        assert (row["output"], row["draws"]) == (line["id"], 1)
        for column, name in (("ids", "id"), ("scores", "score"), ("ranks", "rank"), ("coefficients", "coefficient")):
            assert row[column] == [example[name] for example in result["examples"]]
        assert len(set(row["ids"])) == row["k"]
        assert min(row["coefficients"]) >= 0
        assert sum(row["coefficients"]) == pytest.approx(1, abs=1e-6)
        assert row["relevance_db"] == pytest.approx(10 * math.log10(row["ratio"]))
        assert row["ratio"] == pytest.approx(line["squared_norm"] / result["draws"][0]["squared_error"])
    for entry in printed["relevance"]["rows"]:
        for k, summary in entry["by_budget"].items():
            chosen = [(line, r) for line, r in found if (r["strategy"], r["k"]) == (entry["strategy"], int(k))]
            above = sum(line["squared_norm"] for line, _ in chosen)
            below = sum(result["draws"][0]["squared_error"] for _, result in chosen)
            assert (len(chosen), summary["count"]) == (3, 3)
            assert summary["ratio"] == pytest.approx(above / below)


class Page(HTMLParser):
    """What a browser would make of a page: its elements, links, scripts and text."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data

    @property
    def links(self) -> list[str]:
        """Links to other files."""
        found = [attributes.get("href") or "" for tag, attributes in self.elements if tag == "a"]
        return [link for link in found if not link.startswith("#")]


def test_pages_are_linked_and_run_nothing_of_the_data(asked: tuple[Path, Any]) -> None:
    """relevance.html links the pages of the first outputs, which lie in explanations/ whatever their ids are; HTML in
    ids, texts and columns is shown as text, in no page as an element, an attribute or a script."""
    out, _ = asked
    pages = {str(path.relative_to(out)): Page(path) for path in out.rglob("*.html")}
    links = set(pages["relevance.html"].links)
    assert "explanations/t0.html" in links
    assert {*links, "relevance.html", "report.html"} == set(pages)
    assert len(links) == 2
    for name, page in pages.items():
        assert not {"img", "b"} & {tag for tag, _ in page.elements}, name
        assert not [attributes for _, attributes in page.elements if any(key.startswith("on") for key in attributes)]
        assert not [script for script in page.scripts if script.strip().startswith("alert")], name
        assert sum(tag == "script" for tag, _ in page.elements) == len(page.scripts), name
    assert EVIL in pages["relevance.html"].text
    assert EVIL in pages["report.html"].text
    first = pages["explanations/t0.html"]
    assert f"say {EVIL}" in first.text
    assert f"what colour {EVIL} is the dog 2" in first.text
    assert EVIL_ID in first.text


def test_report_writes_all_pages_again(asked: tuple[Path, Any]) -> None:
    """`gradsift report` makes every page from the JSON beside it, byte for byte; a damaged one is named."""
    out, _ = asked
    pages = {path: path.read_bytes() for path in [out / "relevance.html", *(out / "explanations").glob("*.html")]}
    assert len(pages) > 1
    for path in pages:
        path.unlink()
    Cli("report", out).succeeded()
    assert {path: path.read_bytes() for path in pages} == pages
    kept = (out / "relevance.page.json").read_bytes()
    (out / "relevance.page.json").write_text("{")
    assert "relevance.page.json is damaged" in Cli("report", out).err
    (out / "relevance.page.json").write_bytes(kept)


def test_all_strategies_of_several_estimators(tiny: World, tmp_path: Path) -> None:
    """--compare has every strategy of every estimator at every k; tables are sorted by relevance, random choices are
    five draws, and at k = 1 nothing is more relevant than what relevance pursuit finds."""
    options = ("--compare", "-k", "1,3", "-e", "datainf", "-e", "bm25", "--use-answers", "--pages", 1)
    found = explained(tiny, tmp_path / "run", *options, target=tiny.target)
    assert len(found["explanations"]) == 4
    for entry in found["explanations"]:
        made = [(result["estimator"], result["strategy"], result["k"]) for result in entry["results"]]
        assert len(set(made)) == len(made) == 2 * len(ALL_STRATEGIES) * 2
        assert list(dict.fromkeys(estimator for estimator, _, _ in made)) == ["DataInf", "BM25"]
        ones = {result["strategy"]: result for result in entry["results"] if result["k"] == 1}
        best = ones["relevance pursuit"]["relevance_db"]
        assert best >= max(result["relevance_db"] for result in ones.values()) - 1e-6
        for result in entry["results"]:
            assert len(result["examples"]) == result["k"]
            assert len(result["draws"]) == (5 if result["strategy"] == "random" else 1)
            errors = [draw["squared_error"] for draw in result["draws"]]
            assert result["ratio"] == pytest.approx(entry["squared_norm"] * len(errors) / sum(errors))
    table = found["relevance"]
    assert (table["budgets"], table["sorted_at"], table["outputs"]) == ([1, 3], 3, 4)
    for estimator in ("DataInf", "BM25"):
        values = [row["by_budget"]["3"]["db"] for row in table["rows"] if row["estimator"] == estimator]
        assert len(values) == len(ALL_STRATEGIES)
        assert values == sorted(values)
    shown = command(tiny, "explain", tmp_path / "run", *options, target=tiny.target).succeeded().out
    assert " ".join(shown.split()).count("Selection relevance in dB (ratio of means over 4 outputs") == 2
    page = Page(tmp_path / "run" / "relevance.html")
    assert set(page.links) == {"explanations/t0.html"}
    assert "Gain over the naive choice" in page.text
    assert "most harmful is least influential" in page.text  # of BM25
    assert {(gain["strategy"], gain["naive"]) for gain in table["gains"]} >= {("FL most harmful λ=1", "most harmful")}
    assert [one["highest"] for one in table["extremes"]] == [True, False] * 2
    assert {one["model"] for one in table["coefficients"]} >= {"MSE", "KLT"}
    assert "Coefficients at k = 3" in shown


def test_validate_by_both_routes_and_from_what_is_kept(
    tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps from stored gradients and steps taken for real give the same supports and shifts; a second call takes none
    of them, and loads no model."""
    out, target = tmp_path / "run", write_rows(tmp_path / "target.jsonl", target_rows(2))
    options = ("--use-answers", "-k", "1,3", "-e", "less", "-e", "bm25", "--row-dtype", "float32", "--pages", 0)
    validations = {}
    for route in ("trained", "stored"):
        arguments = (out, "--json", "--route", route, *options)
        found = strictly(command(tiny, "validate", *arguments, target=target))
        validations[route] = found["validation"]
        assert json.loads((out / "validation.json").read_text()) == found["validation"]
        assert found["validation"]["route"] == route
        assert found["relevance"]["budgets"] == [1, 3]
        assert {"validation.json", "relevance.html"} <= set(found["files"])
        page = Page(out / "relevance.html")
        assert f"selections for 2 outputs, steps {route}" in page.text
        with monkeypatch.context() as kept:
            models._HOSTS.clear()
            kept.setattr(models, "load_model", out_of_reach)
            kept.setattr(validate_module, "effect_of", out_of_reach)
            kept.setattr(explain_module.Explanations, "_explain", out_of_reach)
            again = strictly(command(tiny, "validate", *arguments, target=target))
        assert again["validation"] == found["validation"]
        assert again["explanations"] == found["explanations"]
    trained, stored = validations["trained"]["cells"], validations["stored"]["cells"]
    assert len(trained) == 2 * 2 * 2 * 2
    for real, formed in zip(trained, stored, strict=True):
        assert real["cell"] == formed["cell"]
        assert formed["support"] == pytest.approx(real["support"], rel=1e-3, abs=1e-5)
        assert formed["shift"] == pytest.approx(real["shift"], rel=1e-3)
        assert real["support"] == pytest.approx(sum(real["supports"]) / 5)
    shown = command(tiny, "validate", out, "--route", "stored", *options, target=target).succeeded().out
    assert "ρ(relevance, support)" in shown
    assert "validation.json" in shown


def test_an_interrupted_explain_goes_on(tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the first output, the same command explains the others only, and the end is as undisturbed."""
    options = ("-k", "1,2", "--pages", 0, "--use-answers")
    whole = explained(tiny, tmp_path / "whole", *options, target=tiny.target)["explanations"]
    done: list[str] = []
    explain_one = explain_module.Explanations._explain

    def stop_at_the_second(self: Any, output: Any) -> Any:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(output.id)
        return explain_one(self, output)

    monkeypatch.setattr(explain_module.Explanations, "_explain", stop_at_the_second)
    stopped = command(tiny, "explain", tmp_path / "stopped", *options, target=tiny.target)
    assert (stopped.code, done) == (130, ["t0"])
    assert stopped.err.strip().endswith("the same command goes on from there")
    assert not (tmp_path / "stopped" / "explanations.jsonl").exists()
    done.clear()

    def note(self: Any, output: Any) -> Any:
        done.append(output.id)
        return explain_one(self, output)

    monkeypatch.setattr(explain_module.Explanations, "_explain", note)
    assert explained(tiny, tmp_path / "stopped", *options, target=tiny.target)["explanations"] == whole
    assert done == ["t1", "t2", "t3"]


def test_a_choice_and_an_explanation_share_a_report(tiny: World, tmp_path: Path) -> None:
    """Whichever comes last, the report shows both; `report` writes the page again, byte for byte."""
    adapter = ("--adapter", tiny.adapters[-1], "--budget", 3)
    prompt = ("--prompt", "what says the cow", "--output", "it says moo", "-k", 2)

    def both(out: Path) -> str:
        page = (out / "report.html").read_bytes()
        text = Page(out / "report.html").text
        assert "3 of 24 training examples chosen" in text
        assert "it says moo" in text
        (out / "report.html").unlink()
        assert str(out / "report.html") in Cli("report", out).succeeded().out
        assert (out / "report.html").read_bytes() == page
        return text

    first, second = tmp_path / "first", tmp_path / "second"
    tiny("select", first, *adapter).succeeded()
    command(tiny, "explain", first, *prompt).succeeded()
    assert "1 output asked about" in both(first)
    assert "measured on gradients" in Page(first / "explanation.html").text
    assert "measured on plain rows" in Page(first / "report.html").text
    command(tiny, "explain", second, *prompt).succeeded()
    found = tiny("select", second, *adapter, "--json").succeeded().json
    both(second)
    assert set(found["files"]) == {
        "selected.jsonl", "scores.parquet", "diagnostics.json", "skipped.jsonl", "report.html",
    }  # fmt: skip
    command(tiny, "explain", second, "--use-answers", "--pages", 0, target=tiny.target).succeeded()
    assert "4 outputs asked about" in Page(second / "report.html").text
    assert "3 of 24 training examples chosen" in Page(second / "report.html").text


def test_explanations_of_several_calls_share_a_folder(tiny: World, tmp_path: Path) -> None:
    """A later question adds its line, and leaves the pages of earlier ones; only its own files are its results. The
    page makes way for the next one's. Of another checkpoint, all of that goes.
    """
    target = ("--use-answers", "-k", 1, "--pages", 1, "-s", "most_helpful", "--random-sets", 1)
    first = strictly(command(tiny, "validate", tmp_path, *target, "--sanity", "--json", target=tiny.target))
    assert first["command"] == "validate"
    assert first["validation"]["sanity"]["support"]["count"] == 4  # outputs, a random row each
    assert "the output itself beats a random row" in Page(tmp_path / "relevance.html").text
    assert {"relevance.html", "validation.json"} <= set(first["files"])
    pages = {"relevance.html", "relevance.page.json", "explanations/t0.html", "explanations/t0.page.json"}
    assert all((tmp_path / name).exists() for name in (*pages, "validation.json"))
    second = explained(tiny, tmp_path, "--prompt", "what says the cow", "-k", 1)
    assert set(second["files"]) == {"explanations.jsonl", "explanations.parquet", "relevance.json", "skipped.jsonl",
                                    "explanation.html", "report.html"}  # fmt: skip
    assert all((tmp_path / name).exists() for name in pages)
    assert not (tmp_path / "validation.json").exists()
    assert json.loads((tmp_path / "summary.json").read_text())["files"] == second["files"]
    again = explained(tiny, tmp_path, "--prompt", "what says the dog", "-k", 1)
    (one,), (other,) = ([entry["id"] for entry in found["explanations"]] for found in (second, again))
    ids = [json.loads(line)["id"] for line in (tmp_path / "explanations.jsonl").read_text().splitlines()]
    assert ids == ["t0", "t1", "t2", "t3", one, other]
    assert "what says the dog" in Page(tmp_path / "explanation.html").text
    assert "what says the cow" in Page(tmp_path / "explanations" / f"{one}.html").text
    assert not (tmp_path / "explanations" / f"{other}.html").exists()
    assert set(Page(tmp_path / "report.html").links) == {"explanations/t0.html", f"explanations/{one}.html"}
    first = tiny.adapters[0]
    arguments = tiny.arguments("explain", tmp_path, "--adapter", first, "--prompt", "what says the owl", "-k", 1)
    Cli(*arguments, "--max-new-tokens", "4", "--embedding", "none").succeeded()
    assert not any((tmp_path / name).exists() for name in pages)
    assert len((tmp_path / "explanations.jsonl").read_text().splitlines()) == 1
    assert not [path for path in (tmp_path / "explanations").iterdir() if path.is_file()]


def test_prompts_from_the_rows_that_the_pool_sample_left_out(tiny: World, tmp_path: Path) -> None:
    """--pool-sample 0.5 --sample 3 explains three rows outside the half that is chosen from, by rows inside it."""
    options = ("--pool-sample", "0.5", "--sample", 3, "-k", 2, "--use-answers", "--pages", 0)
    found = explained(tiny, tmp_path / "run", *options)
    assert found["pool"]["rows"] == 12
    outputs = [entry["id"] for entry in found["explanations"]]
    chosen = {e["id"] for entry in found["explanations"] for r in entry["results"] for e in r["examples"]}
    own = {row["id"]: row["messages"] for row in pool_rows()}
    assert len(set(outputs)) == 3
    assert not chosen & set(outputs)
    assert {*outputs, *chosen} <= set(own)
    for entry in found["explanations"]:
        assert [*entry["messages"], {"role": "assistant", "content": entry["output"]}] == own[entry["id"]]
    assert explained(tiny, tmp_path / "run", *options)["explanations"] == found["explanations"]
    other = explained(tiny, tmp_path / "other", *options, "--seed", 1)
    assert [entry["id"] for entry in other["explanations"]] != outputs


def test_a_sample_of_a_file_is_drawn_by_the_seed(tiny: World, tmp_path: Path) -> None:
    """--sample 2 explains two rows of the file, in its order, the same again and others with another seed."""
    target = write_rows(tmp_path / "asks.jsonl", target_rows(8))

    def drawn(seed: int) -> list[str]:
        options = ("--use-answers", "--sample", 2, "-k", 1, "--pages", 0, "--seed", seed)
        found: list[str] = [
            entry["id"] for entry in explained(tiny, tmp_path / "run", *options, target=target)["explanations"]
        ]
        return found

    first = drawn(0)
    assert len(set(first)) == 2
    assert first == sorted(first) == drawn(0)
    assert drawn(1) != first


def test_a_run_with_adam_rows_alone_gets_plain_ones(tiny: World, tmp_path: Path) -> None:
    """After `collect` of Adam directions, which explain nothing, `explain` collects plain gradients and says the same
    as in a folder of its own."""
    adapter = ("--adapter", tiny.adapters[-1])
    (store,) = tiny("collect", tmp_path / "adam", *adapter, "--json").succeeded().json
    assert store["view"] == "adam"
    prompt = ("--prompt", "what says the cow", "--output", "it says moo", "-k", 2)
    after = explained(tiny, tmp_path / "adam", *prompt)["explanations"]
    assert after == explained(tiny, tmp_path / "own", *prompt)["explanations"]
    kept = [json.loads(path.read_text())["config"] for path in tmp_path.glob("adam/gradients/*/manifest.json")]
    assert sorted(config["view"] for config in kept) == ["adam", "plain", "plain"]


def test_another_adapter_in_the_folder_gets_its_own_explanations(tiny: World, tmp_path: Path) -> None:
    """Explanations at another checkpoint are made anew beside the first ones, and mix with nothing."""
    prompt = ("--prompt", "what says the cow", "--output", "it says moo", "-k", 2)

    def at(adapter: str, out: Path) -> Any:
        arguments = tiny.arguments("explain", out, "--adapter", adapter, "--embedding", "none", "--json", *prompt)
        return strictly(Cli(*arguments))["explanations"]

    first, second = tiny.adapters
    before = at(first, tmp_path / "run")
    other = at(second, tmp_path / "run")
    assert other[0]["loss"] != before[0]["loss"]
    assert other == at(second, tmp_path / "own")
    assert at(first, tmp_path / "run") == before


def test_a_given_answer_is_not_taken_for_a_generated_one(tiny: World, tmp_path: Path) -> None:
    """The model's own words, given with --use-answers, are explained alike and said to be given. What the tiny model
    says is no text, so words are put into its mouth where the run folder keeps them; and its template ends with the
    answer, so that both are the same tokens."""
    from transformers import AutoTokenizer

    out, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(tiny.model, model)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template.replace("<|im_end|>\n", "<|im_end|>"))
    target = write_rows(tmp_path / "asks.jsonl", [{"id": "cow", "prompt": "what says the cow", "completion": "moo"}])
    ask: dict[str, Any] = {"model": model, "target": target}
    explained(tiny, out, "-k", 2, **ask)
    (kept,) = out.glob("outputs/*/*.json")
    token_ids = AutoTokenizer.from_pretrained(model).encode("moo<|im_end|>")
    kept.write_text(json.dumps({"token_ids": token_ids, "finished": True}))
    (own,) = explained(tiny, out, "-k", 2, **ask)["explanations"]
    (given,) = explained(tiny, out, "-k", 2, "--use-answers", **ask)["explanations"]
    assert (own["generated"], given["generated"]) == (True, False)
    assert own | {"generated": False} == given


def test_an_answer_that_ends_at_once_is_explained_and_said(tiny: World, tmp_path: Path) -> None:
    """A model that says nothing has still said the end of its turn: that is what is explained, and the terminal shows
    words in place of an empty line."""
    from transformers import AutoTokenizer

    out, prompt = tmp_path / "run", ("--prompt", "what says the cow", "-k", 2)
    explained(tiny, out, *prompt)
    (kept,) = out.glob("outputs/*/*.json")
    end = AutoTokenizer.from_pretrained(tiny.model).encode("<|im_end|>")
    kept.write_text(json.dumps({"token_ids": end, "finished": True}))
    (entry,) = explained(tiny, out, *prompt)["explanations"]
    assert (entry["output"], entry["tokens"], entry["finished"]) == ("", 1, True)
    assert len(entry["results"][0]["examples"]) == 2
    shown = command(tiny, "explain", out, *prompt).succeeded().out
    assert "the model says: (nothing: the turn ends at once)" in shown


# --- what one output cannot stop


def certain_of(tiny: World, folder: Path, prompt: str, others: Sequence[str]) -> Path:
    """The tiny model with `Z` as the one possible first token after `prompt`, and an impossible one after others."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    network = AutoModelForCausalLM.from_pretrained(tiny.model)
    PeftModel.from_pretrained(network, tiny.adapters[-1])
    states = []
    for text in (prompt, *others):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            states.append(network.model(ids["input_ids"]).last_hidden_state[0, -1])
    wanted = torch.tensor([300.0, *[-300.0] * len(others)])
    row = torch.linalg.lstsq(torch.stack(states), wanted).solution
    shutil.copytree(tiny.model, folder)
    tensors = load_file(folder / "model.safetensors")
    (token,) = tokenizer.encode("Z")
    tensors["lm_head.weight"][token] = row
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_output_without_a_gradient_stops_nothing(tiny: World, tmp_path: Path) -> None:
    """What the model is certain to say has the gradient 0 and no explanation: it is listed, the others go on; alone it
    is an error that says so."""
    prompt, others = "what says the cow", ["what says the hen", "what colour is the ant"]
    model = certain_of(tiny, tmp_path / "certain", prompt, others)
    rows = [{"id": f"t{number}", "prompt": text} for number, text in enumerate([others[0], prompt, others[1]])]
    options = ("--max-new-tokens", 1, "-k", 2, "-e", "less", "-e", "datainf", "-e", "trak", "-e", "bm25", "--pages", 3)
    target = write_rows(tmp_path / "asks.jsonl", rows)
    found = explained(tiny, tmp_path / "run", *options, model=model, target=target)
    assert [entry["id"] for entry in found["explanations"]] == ["t0", "t2"]
    (failed,) = found["failed"]
    detail = "the output's gradient is zero: nothing to explain"
    assert (failed["id"], failed["reason"], failed["detail"]) == ("t1", "zero_gradient", detail)
    assert found["skipped"] == {"zero_gradient": 1}
    assert "1 outputs could not be explained" in Page(tmp_path / "run" / "relevance.html").text
    alone = explained(tiny, tmp_path / "alone", *options, "--row", "t2", model=model, target=target)
    for mixed, one in zip(found["explanations"][1]["results"], alone["explanations"][0]["results"], strict=True):
        assert [example["id"] for example in mixed["examples"]] == [example["id"] for example in one["examples"]]
    refused = command(tiny, "explain", tmp_path / "run", "--prompt", prompt, "--max-new-tokens", 1, model=model)
    assert refused.err == f"error: no prompt can be explained; first: {detail}\n"


def test_one_output_that_fails_is_listed(tiny: World, tmp_path: Path) -> None:
    """A prompt on which the model's logits are NaN, an answer on which its loss is, and an empty prompt are listed with
    reasons; the other outputs are explained and validated, by estimators that take all outputs at once too."""
    from transformers import AutoTokenizer

    (token,) = AutoTokenizer.from_pretrained(tiny.model).encode("Z")
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    rows = [
        {"id": "nan", "prompt": "what says Z", "completion": "it says Z"},
        {"id": "good", "prompt": "what says the cow", "completion": "it says cowcow"},
        {"id": "empty", "prompt": " ", "completion": "x"},
        {"id": "fine", "prompt": "what colour is the dog", "completion": "the dog is blue"},
    ]
    target = write_rows(tmp_path / "asks.jsonl", rows)
    estimators = [part for kind in ("datainf", "projected_inverse", "trak", "bm25") for part in ("-e", kind)]
    common = ("--json", "-k", 2, "--pages", 0, "-s", "most_helpful", "--random-sets", 1, *estimators)
    for options, reason, detail in (
        ((), "no_output", "the model's logits hold NaN or infinity"),
        (("--use-answers",), "gradient", "the loss is nan"),
    ):
        validated = command(tiny, "validate", tmp_path / "run", *common, *options, model=model, target=target)
        found = strictly(validated)
        assert [entry["id"] for entry in found["explanations"]] == ["good", "fine"]
        failed = {skip["id"]: skip for skip in found["failed"]}
        assert failed.keys() == {"nan", "empty"}
        assert failed["nan"]["reason"] == reason
        assert detail in failed["nan"]["detail"]
        assert failed["empty"]["detail"] == "the prompt is empty"
        listed = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
        assert {row["id"] for row in listed} == {"nan", "empty"}
        cells = found["validation"]["cells"]
        assert len(cells) == 2 * 4
        assert {cell["cell"]["output"] for cell in cells} == {"good", "fine"}


# --- the map of meanings


def test_a_missing_embedding_extra(tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is named is refused before anything is done; by default the page says what to install."""
    monkeypatch.setattr(embeddings, "available", lambda: False)
    prompt = ("--adapter", tiny.adapters[-1], "--prompt", "what says the cow", "--output", "it says moo", "-k", 2)
    install = "pip install 'gradsift[embeddings]'"
    refused = tiny("explain", tmp_path / "named", *prompt, "--embedding", "some/model")
    assert refused.code == 2
    assert refused.err == f"error: sentence embeddings need sentence-transformers: {install}\n"
    assert not (tmp_path / "named").exists()
    tiny("explain", tmp_path / "default", *prompt).succeeded()
    assert install in Page(tmp_path / "default" / "explanation.html").text


def test_an_embedding_model_that_is_not_there(tiny: World, tmp_path: Path) -> None:
    """A named model that cannot be loaded is refused before anything is done."""
    if not embeddings.available():
        pytest.skip("sentence-transformers is not installed")
    refused = tiny("explain", tmp_path / "run", "--prompt", "x", "--embedding", tmp_path / "none")
    assert refused.code == 1
    assert f"cannot load the embedding model {tmp_path / 'none'}" in refused.err
    assert not (tmp_path / "run").exists()
