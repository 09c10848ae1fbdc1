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
from gradsift.validation.bench import Bench, bench
from gradsift.validation.benchmark import Benchmark
from gradsift.validation.datamodel import joint_influence, lds, qld
from gradsift.validation.one_step import OneStep
from gradsift.validation.trainer_check import check_trainer
from gradsift.validation.validate import Validation, validate, validate_explanations
from gradsift.warmup.checkpoint import Checkpoint, open_checkpoint
from gradsift.warmup.merge import merge
from gradsift.warmup.recorder import Recorder
from gradsift.warmup.train import Training, Warmup, train, warm_up

__version__: str
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
