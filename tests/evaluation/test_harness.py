"""Tasks of lm-eval with a task file and data of our own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gradsift.base.errors import ConfigError
from gradsift.evaluation.evaluate import evaluate, measure
from gradsift.evaluation.harness import LMEval
from gradsift.evaluation.setup import open_model
from gradsift.model.models import host
from tiny_world import World, write_lm_eval_task, write_rows

ROWS = [{"question": f"what colour is the cat {n}", "choices": [" red", " blue"], "gold": n % 2} for n in range(6)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'gradsift[eval]'")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return Path(write_lm_eval_task(tmp_path / "tasks", ROWS))


@pytest.mark.filterwarnings("default")  # lm-eval's own
def test_a_local_task_is_measured_with_the_loaded_model(tiny: World, folder: Path, tmp_path: Path) -> None:
    """Accuracy by document equals that of the choices' log-likelihoods under the model; an unknown task is a message
    beside it; nothing is measured twice until the data change."""
    place = open_model(tiny.model, out=str(tmp_path / "run"), max_length=64, device="cpu")
    metric = LMEval(tasks=("colours",), include_path=str(folder))
    found = evaluate(place, None, [metric, LMEval(tasks=("colour",), include_path=str(folder))])
    assert "knows no task 'colour'" in found.results[1].error
    model = host(tiny.model, "float32", "cpu").base()
    expected = []
    for row in ROWS:
        scores = []
        for choice in row["choices"]:
            prompt = place.tokenizer(row["question"])["input_ids"]
            ids = torch.tensor([place.tokenizer(row["question"] + choice)["input_ids"]])
            with torch.inference_mode():
                log_p = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
            scores.append(float(log_p.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()))
        expected.append(float(int(np.argmax(scores)) == row["gold"]))
    figure = found["colours/acc"]
    assert list(figure.per_item.values()) == expected
    assert figure.value == np.mean(expected)
    assert figure.n == 6
    assert figure.standard_error == pytest.approx(np.std(expected, ddof=1) / 6**0.5)
    stamp = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "evaluations").rglob("*.json")}
    assert measure(place, None, metric) == found.results[0]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "evaluations").rglob("*.json")} == stamp
    write_rows(folder / "colours.jsonl", [row | {"gold": 1 - row["gold"]} for row in ROWS])
    assert list(measure(place, None, metric)["colours/acc"].per_item.values()) == [1 - value for value in expected]


def test_without_lm_eval_the_message_names_the_extra(
    tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metric alone fails, and says what to install."""
    monkeypatch.setattr("gradsift.evaluation.harness._installed", lambda: False)
    place = open_model(tiny.model, out=str(tmp_path / "run"), max_length=64, device="cpu")
    with pytest.raises(
        ConfigError, match=r"lm-eval runs arc_easy, and it is not installed: pip install 'gradsift\[eval\]'"
    ):
        measure(place, None, LMEval(tasks=("arc_easy",)))
