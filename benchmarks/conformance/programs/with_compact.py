"""Compact's relevance, coefficients, selections, BM25, AUC, DataInf and one-step validation, on small random gradients.

    python with_compact.py CHECKOUT OUT.json    # of loris3/ceelm

Its scripts expect a GPU by name and data sets from a hub. Here `cuda:0` means the CPU, and `load_experiment_data` is a
module of this program's that hands out random gradients; what computes is the checkout's own.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from random_inputs import gradients
from recording import checkout, record, rounded, run_script, stand_in
from tiny_lora import conversations, moved, tiny_lora

TRAIN, TEST = ("train", "train"), ("test", "test")  # name and split
POOL, CANDIDATES, DIM = 40, 20, 12
BUDGETS = (1, 5, 8)
ORDERS = ("MostHelpful", "MostHarmful", "MostInfluential", "LeastInfluential")


class Stored:
    """What the checkout asks of an estimator: scores `[test train]` (negative = helps) and gradients by position."""

    model_path = "model"

    def __init__(self, pool: np.ndarray, tests: np.ndarray, scores: np.ndarray) -> None:
        self.gradients = {TRAIN: torch.from_numpy(pool), TEST: torch.from_numpy(tests)}
        self.influence_estimate = pd.DataFrame(scores)

    def get_config_string(self) -> str:
        return "random"

    def get_gradient(self, name: str, split: str, at: Any) -> Any:
        rows = self.gradients[name, split]
        return rows[at] if isinstance(at, int) else [rows[position] for position in at]


@contextlib.contextmanager
def cpu_for_cuda() -> Iterator[None]:
    """`.to("cuda:0")` stays where it is."""
    moved = torch.Tensor.to

    def to(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return moved(tensor, *("cpu" if argument == "cuda:0" else argument for argument in arguments), **options)

    torch.Tensor.to = to  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.to = moved  # type: ignore[method-assign]


def selections(stored: Stored) -> dict[str, Any]:
    """Positions that every strategy chooses for the first test instance, by budget."""
    import explanations

    found: dict[str, Any] = {}
    for budget in BUDGETS:
        for order in ORDERS:
            given = (0, stored, *TRAIN, *TEST)
            chosen = {"naive": getattr(explanations, f"TopK{order}")(*given, k=budget)}
            chosen["divine"] = getattr(explanations, f"DIVINE{order}")(*given, k=budget, m=CANDIDATES)
            for trade_off in (0.0, 0.25, 0.5, 0.75, 1.0):
                kind = getattr(explanations, f"FacilityLocation{order}")
                chosen[f"facility_location {trade_off}"] = kind(*given, k=budget, m=CANDIDATES, lambda_=trade_off)
            for name, explanation in chosen.items():
                found.setdefault(name, {}).setdefault(order, {})[budget] = list(map(int, explanation.documents))
        aide = explanations.AIDE(0, stored, *TRAIN, *TEST, k=budget, m=CANDIDATES)
        found.setdefault("aide", {})[budget] = list(map(int, aide.documents))
    return found


def relevance(folder: Path, stored: Stored, chosen: dict[int, list[int]]) -> list[dict[str, Any]]:
    """What `score.py` writes for the first test instance: coefficients by every model, and the gain."""
    import linear_coders

    class Chosen:
        document_idx = 0

        def __init__(self, _index: int, _estimator: Any, *_: Any, k: int) -> None:
            self.documents, self.description = chosen[k], f"chosen {k}"

    def on_cpu(coder: Any) -> Any:
        return lambda A, g, device, **options: coder(A, g, device="cpu", **options)

    coders = [coder for name, coder in vars(linear_coders).items() if name in CODERS]
    names = {"train_dataset_name": TRAIN[0], "train_dataset_split": TRAIN[1], "test_dataset_name": TEST[0],
             "test_dataset_split": TEST[1]}  # fmt: skip
    experiment = ModuleType("load_experiment_data")
    for name in ("explanation_m", "explanation_k", "explanation_lambda", "explanation_seed"):
        setattr(experiment, name, None)
    for name, value in names.items():
        setattr(experiment, name, value)
    data = SimpleNamespace(select=lambda _positions: None)
    experiment.explanation_types = [Chosen]  # type: ignore[attr-defined]
    experiment.linear_coders = [on_cpu(coder) for coder in coders]  # type: ignore[attr-defined]
    experiment.load_data_and_estimators = lambda: (data, _OfOne(data), [stored])  # type: ignore[attr-defined]
    sys.modules["load_experiment_data"] = experiment
    with cpu_for_cuda(), contextlib.redirect_stderr(io.StringIO()):
        for k in chosen:
            run_script(folder / "score.py", "--explanation_type", "Chosen", "-k", k)
    tables = [pd.read_parquet(file) for file in sorted(Path("cache/scoring").rglob("*.parquet"))]
    found = pd.concat(tables).to_dict("records")
    return [
        {
            "chosen": chosen[int(row["explanation_type"].split()[1])],
            "coder": row["linear_coder"],
            "gain": row["pred_gain"],
            "mse": row["mse"],
            "t": list(row["t"]),
        }
        for row in found
    ]


CODERS = ("MSECoder", "MSECoderProjUSimp", "MSECoderProjUSimpSparse", "MSECoderProjUSimpSparseSoftThresh",
          "MSECoderNNLSL2", "KLTCoder")  # fmt: skip


class _OfOne(SimpleNamespace):
    """A data set of one instance."""

    def __init__(self, data: Any) -> None:
        super().__init__(select=data.select)

    def __len__(self) -> int:
        return 1


def bm25() -> dict[str, Any]:
    """Scores `[test train]` of token ids, some of which stand twice in a query."""
    from influence_estimation.bm25_inf import BM25Estimator

    stream = np.random.RandomState(5)
    pool, tests = ([stream.randint(0, 30, length).tolist() for length in lengths] for lengths in (
        [3, 9, 14, 5, 1, 30, 12, 7, 20, 9], [6, 15, 2]))  # fmt: skip

    class Tokenised(dict):  # type: ignore[type-arg]
        column_names = ()

        def __len__(self) -> int:
            return len(self["input_ids"])

        def map(self, *_: Any, **__: Any) -> Any:
            return self

    estimator = object.__new__(BM25Estimator)
    estimator.k1, estimator.b, estimator.num_workers = 1.5, 0.75, 1
    estimator.train_dataset, estimator.test_dataset = Tokenised(input_ids=pool), Tokenised(input_ids=tests)
    estimator.save = lambda: None
    with contextlib.redirect_stderr(io.StringIO()):
        estimator.run()
    return {"pool": pool, "target": tests, "scores": rounded(estimator.influence_estimate.to_numpy())}


def datainf() -> dict[str, Any]:
    """Influence `[test train]` (negative = helps) of gradients in two modules."""
    from influence_estimation.datainf.influence import IFEngineGeneration

    stream = np.random.RandomState(6)
    modules = {"A": stream.standard_normal((9, 5)), "B": 0.1 * stream.standard_normal((9, 7))}
    rows = [{name: torch.from_numpy(values[row]) for name, values in modules.items()} for row in range(9)]
    engine = IFEngineGeneration()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        engine.preprocess_gradients(dict(enumerate(rows[6:])), lambda _name, _split, ids: [rows[i] for i in ids])
        engine.compute_hvps(list(range(6)), *TRAIN, *TEST, "datainf")
        engine.compute_IF({"indices": list(range(6))}, *TRAIN)
    scores = engine.IF_dict["proposed"].to_numpy()
    return {name: values.tolist() for name, values in modules.items()} | {"pool": 6, "scores": rounded(scores)}


def auc(folder: Path) -> dict[str, Any]:
    """The notebook's area under the gains over budgets, of made-up gains of three instances."""
    cells = json.loads((folder / "scoring.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    own = next(source for source in sources if source.startswith("def compute_auc"))
    space: dict[str, Any] = {"np": np, "pd": pd}
    exec(compile(ast.parse(own), "scoring.ipynb", "exec"), space)
    gains = {1: [0.5, 1.0, 1.5], 5: [2.0, 4.0, 9.0], 10: [3.0, 8.0, 10.0], 25: [5.0, 5.0, 50.0]}
    same = ("model", "train_dataset", "train_split", "test_dataset", "test_split", "estimator", "linear_coder",
            "explanation_type_no_k")  # fmt: skip
    rows = [dict.fromkeys(same, "x") | {"k": k, "pred_gain": gain} for k, values in gains.items() for gain in values]
    return {"gains": gains, "area": float(space["compute_auc"](pd.DataFrame(rows))["auc_pred_gain"][0])}


def validation() -> dict[str, Any]:
    """Support and shift of one output when the weights change, as `validation_engine.py` measures them."""
    for name in ("SFTTrainer", "SFTConfig"):
        stand_in("trl", name)
    import validation_engine

    class Given(validation_engine.ValidationEngine):  # type: ignore[misc]
        def __init__(self) -> None:
            self.device, self.adapter_path, self.tokenizer = "cpu", "", SimpleNamespace(pad_token_id=0)

        def finetune(self, model: Any, *_: Any, **__: Any) -> Any:
            return moved(MOVED_BY)

    outputs = conversations(4, seed=31)
    validation_engine.from_pretrained_with_retry = lambda *_, **__: tiny_lora()
    validation_engine.tokenize_dataset = lambda dataset, **_: [
        {name: values[0] for name, values in tokens.batch().items()} for tokens in dataset
    ]
    found = []
    for output in outputs:
        metrics = Given().score([], [output], seed=0)
        found.append({name: float(metrics[name][0]) for name in ("delta_log_p", "log_p_before_ft", "jsd")})
    return {"outputs": len(outputs), "moved_by": MOVED_BY, "effects": rounded(found)}


MOVED_BY = 0.05


def main() -> None:
    folder = checkout(__doc__ or "")
    for name in ("wandb", "dotenv", "trl"):
        stand_in(name)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # caches and results go into the folder that one stands in
        stored = Stored(*gradients(1, POOL, DIM))
        found = {
            "gradients": {"seed": 1, "pool": POOL, "dim": DIM},
            "selections": selections(stored),
            "relevance": relevance(folder, stored, {1: [3], 3: [3, 17, 8], 8: [3, 17, 8, 30, 5, 22, 11, 2]}),
            "bm25": bm25(),
            "datainf": datainf(),
            "auc": auc(folder),
            "validation": validation(),
        }
        record(found, ("torch", "transformers", "peft", "numpy", "scipy", "scikit-learn", "pandas", "apricot-select"),
               checkout=folder)  # fmt: skip


if __name__ == "__main__":
    main()
