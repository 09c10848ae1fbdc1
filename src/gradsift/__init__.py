"""Choose the training examples that help a fine-tuned language model, and explain an output by the few behind it.

    import gradsift as gs

    pool = gs.open_pool("pool.jsonl", model="HuggingFaceTB/SmolLM2-135M-Instruct", out="runs/math")
    target = gs.open_target("math.jsonl", pool)
    scores = gs.score(pool, target, gs.LESS())            # higher = training on it helps
    chosen = gs.select(scores, gs.TopK(), budget=0.05)
    answer = gs.explain(pool, "What is 17 + 25?", k=5)

Methods are frozen values, stages are functions. Names are loaded when first used, so that importing costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradsift.base.errors import GradsiftError
    from gradsift.base.progress import Reporter
    from gradsift.compare.run import run_compare
    from gradsift.compare.table import Comparison
    from gradsift.context import Pool, Setup, Target, open_pool, open_target
    from gradsift.data.load import Columns
    from gradsift.data.sample import RowSample
    from gradsift.evaluation.arms import Arm, Compare, Curve
    from gradsift.evaluation.evaluate import Evaluation, evaluate
    from gradsift.evaluation.fine_tune import train_on
    from gradsift.evaluation.grading import Grading
    from gradsift.evaluation.harness import LMEval
    from gradsift.evaluation.length_controlled import instruction_difficulty, length_controlled_win_rate
    from gradsift.evaluation.loss import HeldOut, HeldOutLoss, held_out_loss
    from gradsift.evaluation.mean_reward import MeanReward
    from gradsift.evaluation.metric import Figure, Measured
    from gradsift.evaluation.mixture import Mixture, mix
    from gradsift.evaluation.pairwise import Pairwise
    from gradsift.evaluation.preferences import Preferences
    from gradsift.evaluation.setup import Trained, open_model
    from gradsift.explanation.explain import ALL_STRATEGIES, Explanations, explain
    from gradsift.explanation.outputs import Question
    from gradsift.explanation.relevance import selection_relevance
    from gradsift.explanation.result import Explanation
    from gradsift.explanation.table import RelevanceTable, relevance_table
    from gradsift.generation.assistant import Assistant
    from gradsift.generation.endpoint import Endpoint
    from gradsift.generation.sampling import Sampling
    from gradsift.gradients.collect import Adam, Gradients, collect
    from gradsift.gradients.policy import PolicyGradient
    from gradsift.gradients.projection import Projection
    from gradsift.influence.alpagasus import AlpaGasus
    from gradsift.influence.bm25 import BM25
    from gradsift.influence.datainf import DataInf, ProjectedInverse
    from gradsift.influence.deita import DEITA
    from gradsift.influence.diagnostics import PolicyDiagnostics, diagnose
    from gradsift.influence.dsir import DSIR
    from gradsift.influence.ekfac import EKFAC
    from gradsift.influence.estimator import Estimator, Influence
    from gradsift.influence.ji2s import JI2S
    from gradsift.influence.less import LESS
    from gradsift.influence.magic import MAGIC
    from gradsift.influence.nice import NICE, NICEIF
    from gradsift.influence.nice_ekfac import NICEEKFAC
    from gradsift.influence.nice_magic import NICEMAGIC
    from gradsift.influence.prompts import PromptTarget, open_prompts
    from gradsift.influence.random import Random
    from gradsift.influence.ratings import (
        DifficultyRating,
        FunctionRating,
        JudgeRating,
        LengthRating,
        PerplexityRating,
    )
    from gradsift.influence.rds import RDS
    from gradsift.influence.rerank import Rerank
    from gradsift.influence.scores import Scores, score
    from gradsift.influence.states import RDSPlus, RepSim
    from gradsift.influence.trak import TRAK
    from gradsift.jobs.bench import run_bench
    from gradsift.recipe import Recipe, load_recipe
    from gradsift.selection.aide import Aide
    from gradsift.selection.candidates import Candidates
    from gradsift.selection.diverse import Diverse
    from gradsift.selection.divine import Divine
    from gradsift.selection.facility_location import FacilityLocation
    from gradsift.selection.gumbel import GumbelTopK
    from gradsift.selection.joint_greedy import JointGreedy
    from gradsift.selection.metagradient import MetagradientDescent
    from gradsift.selection.pursuit import RelevancePursuit
    from gradsift.selection.random import RandomChoice, RandomExamples
    from gradsift.selection.select import Selection, select
    from gradsift.selection.selector import Selector
    from gradsift.selection.top_k import LeastInfluential, MostHarmful, MostHelpful, MostInfluential, TopK
    from gradsift.selection.transport import TSDS
    from gradsift.store.gradient_store import GradientStore
    from gradsift.store.precision import MeasuredError
    from gradsift.store.run import Run
    from gradsift.validation.bench import Bench, Benchmark, bench
    from gradsift.validation.datamodel import joint_influence, lds, qld
    from gradsift.validation.one_step import OneStep
    from gradsift.validation.trainer_check import check_trainer
    from gradsift.validation.validate import Validation, validate, validate_explanations
    from gradsift.warmup.checkpoint import Checkpoint, open_checkpoint
    from gradsift.warmup.merge import merge
    from gradsift.warmup.recorder import Recorder
    from gradsift.warmup.train import Training, Warmup, train, warm_up

_WHERE = {
    "gradsift.compare.run": ("run_compare",),
    "gradsift.jobs.bench": ("run_bench",),
    "gradsift.validation.bench": ("Bench", "Benchmark", "bench"),
    "gradsift.context": ("Pool", "Setup", "Target", "open_pool", "open_target"),
    "gradsift.data.load": ("Columns",),
    "gradsift.data.sample": ("RowSample",),
    "gradsift.base.errors": ("GradsiftError",),
    "gradsift.evaluation.arms": ("Arm", "Compare", "Curve"),
    "gradsift.compare.table": ("Comparison",),
    "gradsift.evaluation.evaluate": ("Evaluation", "evaluate"),
    "gradsift.evaluation.fine_tune": ("train_on",),
    "gradsift.evaluation.grading": ("Grading",),
    "gradsift.evaluation.harness": ("LMEval",),
    "gradsift.evaluation.length_controlled": ("instruction_difficulty", "length_controlled_win_rate"),
    "gradsift.evaluation.loss": ("HeldOut", "HeldOutLoss", "held_out_loss"),
    "gradsift.evaluation.preferences": ("Preferences",),
    "gradsift.evaluation.mean_reward": ("MeanReward",),
    "gradsift.evaluation.mixture": ("Mixture", "mix"),
    "gradsift.evaluation.metric": ("Figure", "Measured"),
    "gradsift.evaluation.pairwise": ("Pairwise",),
    "gradsift.evaluation.setup": ("Trained", "open_model"),
    "gradsift.explanation.explain": ("ALL_STRATEGIES", "Explanations", "explain"),
    "gradsift.explanation.outputs": ("Question",),
    "gradsift.explanation.relevance": ("selection_relevance",),
    "gradsift.explanation.result": ("Explanation",),
    "gradsift.explanation.table": ("RelevanceTable", "relevance_table"),
    "gradsift.gradients.collect": ("Adam", "Gradients", "collect"),
    "gradsift.gradients.projection": ("Projection",),
    "gradsift.influence.alpagasus": ("AlpaGasus",),
    "gradsift.influence.bm25": ("BM25",),
    "gradsift.influence.deita": ("DEITA",),
    "gradsift.generation.assistant": ("Assistant",),
    "gradsift.generation.endpoint": ("Endpoint",),
    "gradsift.generation.sampling": ("Sampling",),
    "gradsift.gradients.policy": ("PolicyGradient",),
    "gradsift.influence.diagnostics": ("PolicyDiagnostics", "diagnose"),
    "gradsift.influence.nice": ("NICE", "NICEIF"),
    "gradsift.influence.nice_ekfac": ("NICEEKFAC",),
    "gradsift.influence.nice_magic": ("NICEMAGIC",),
    "gradsift.influence.prompts": ("PromptTarget", "open_prompts"),
    "gradsift.influence.datainf": ("DataInf", "ProjectedInverse"),
    "gradsift.influence.ekfac": ("EKFAC",),
    "gradsift.influence.ji2s": ("JI2S",),
    "gradsift.influence.estimator": ("Estimator", "Influence"),
    "gradsift.influence.less": ("LESS",),
    "gradsift.influence.magic": ("MAGIC",),
    "gradsift.influence.dsir": ("DSIR",),
    "gradsift.influence.random": ("Random",),
    "gradsift.influence.ratings": (
        "DifficultyRating",
        "FunctionRating",
        "JudgeRating",
        "LengthRating",
        "PerplexityRating",
    ),
    "gradsift.influence.rds": ("RDS",),
    "gradsift.influence.scores": ("Scores", "score"),
    "gradsift.influence.rerank": ("Rerank",),
    "gradsift.influence.states": ("RDSPlus", "RepSim"),
    "gradsift.influence.trak": ("TRAK",),
    "gradsift.base.progress": ("Reporter",),
    "gradsift.recipe": ("Recipe", "load_recipe"),
    "gradsift.store.run": ("Run",),
    "gradsift.selection.aide": ("Aide",),
    "gradsift.selection.candidates": ("Candidates",),
    "gradsift.selection.diverse": ("Diverse",),
    "gradsift.selection.divine": ("Divine",),
    "gradsift.selection.facility_location": ("FacilityLocation",),
    "gradsift.selection.gumbel": ("GumbelTopK",),
    "gradsift.selection.joint_greedy": ("JointGreedy",),
    "gradsift.selection.metagradient": ("MetagradientDescent",),
    "gradsift.selection.pursuit": ("RelevancePursuit",),
    "gradsift.selection.random": ("RandomChoice", "RandomExamples"),
    "gradsift.selection.select": ("Selection", "select"),
    "gradsift.selection.selector": ("Selector",),
    "gradsift.selection.top_k": ("LeastInfluential", "MostHarmful", "MostHelpful", "MostInfluential", "TopK"),
    "gradsift.selection.transport": ("TSDS",),
    "gradsift.store.gradient_store": ("GradientStore",),
    "gradsift.store.precision": ("MeasuredError",),
    "gradsift.validation.datamodel": ("joint_influence", "lds", "qld"),
    "gradsift.validation.one_step": ("OneStep",),
    "gradsift.validation.trainer_check": ("check_trainer",),
    "gradsift.validation.validate": ("Validation", "validate", "validate_explanations"),
    "gradsift.warmup.checkpoint": ("Checkpoint", "open_checkpoint"),
    "gradsift.warmup.merge": ("merge",),
    "gradsift.warmup.recorder": ("Recorder",),
    "gradsift.warmup.train": ("Training", "Warmup", "train", "warm_up"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__version__ = "0.1.0"
__all__ = [  # noqa: RUF022  # kept in the order of the flow
    "open_pool", "open_target", "Pool", "Target", "Columns", "RowSample",
    "Warmup", "Training", "warm_up", "train", "Checkpoint", "open_checkpoint", "Recorder", "check_trainer",
    "Gradients", "Adam", "Projection", "collect", "GradientStore", "MeasuredError", "Run",
    "score", "Scores", "Estimator", "Influence",
    "LESS", "DataInf", "ProjectedInverse", "TRAK", "EKFAC", "JI2S", "MAGIC", "BM25", "RDS", "RDSPlus", "RepSim",
    "DSIR", "Rerank", "Random", "AlpaGasus", "DEITA",
    "JudgeRating", "FunctionRating", "LengthRating", "PerplexityRating", "DifficultyRating",
    "NICE", "NICEIF", "NICEEKFAC", "NICEMAGIC", "open_prompts", "PromptTarget", "Sampling", "Assistant", "Endpoint",
    "PolicyGradient", "diagnose", "PolicyDiagnostics", "select", "Selection", "Selector", "Candidates", "TopK",
    "FacilityLocation", "RandomChoice", "GumbelTopK", "TSDS", "JointGreedy", "MetagradientDescent", "Diverse",
    "explain", "Question", "Explanation", "Explanations", "ALL_STRATEGIES",
    "MostHelpful", "MostHarmful", "MostInfluential", "LeastInfluential", "Divine", "Aide", "RandomExamples",
    "RelevancePursuit", "selection_relevance", "relevance_table", "RelevanceTable",
    "validate", "validate_explanations", "Validation", "OneStep", "lds", "qld", "joint_influence", "bench", "Bench",
    "Benchmark", "run_bench",
    "train_on", "Trained", "merge", "open_model", "Setup", "evaluate", "Evaluation", "Measured", "Figure",
    "HeldOutLoss", "Preferences", "MeanReward", "Pairwise", "Grading", "LMEval", "length_controlled_win_rate",
    "instruction_difficulty", "held_out_loss", "HeldOut",
    "mix", "Mixture", "run_compare", "Comparison", "Compare", "Arm", "Curve", "Recipe", "load_recipe", "Reporter",
    "GradsiftError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    if name in ("errors", "models", "types"):
        return import_module(f"gradsift.{name}")
    raise AttributeError(f"module 'gradsift' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
