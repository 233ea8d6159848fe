"""organfast: learn organs from a few labelled CT scans, then find and segment them in new ones.

Importing this package loads nothing heavy; each public name is imported when it is first used.
For research use only, not a medical device.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from organfast.adaptation import Adapt as Adapt
    from organfast.anatomy import ClassTable as ClassTable
    from organfast.anatomy import Structure as Structure
    from organfast.augmentation import Augmentation as Augmentation
    from organfast.batch import BatchPlan as BatchPlan
    from organfast.batch import segment_batch as segment_batch
    from organfast.batchworker import Outcome as Outcome
    from organfast.batchworker import Outputs as Outputs
    from organfast.blocks import Block as Block
    from organfast.blocks import Context as Context
    from organfast.blocks import block_views as block_views
    from organfast.blocks import gather_blocks as gather_blocks
    from organfast.errors import InputError as InputError
    from organfast.evaluation import Scoring as Scoring
    from organfast.evaluation import cross_validate as cross_validate
    from organfast.evaluation import evaluate as evaluate
    from organfast.grid import ModelGrid as ModelGrid
    from organfast.layouts import find_cases as find_cases
    from organfast.learning import Recipe as Recipe
    from organfast.learning import Sampling as Sampling
    from organfast.learning import train as train
    from organfast.models.classifier import Model as Model
    from organfast.models.classifier import load_model as load_model
    from organfast.models.classifier import save_model as save_model
    from organfast.models.export import export_model as export_model
    from organfast.models.forest import ForestSettings as ForestSettings
    from organfast.networklearning import NetworkRecipe as NetworkRecipe
    from organfast.organs import Organ as Organ
    from organfast.pipeline import Settings as Settings
    from organfast.pipeline import locate as locate
    from organfast.pipeline import segment as segment
    from organfast.pipeline import segment_many as segment_many
    from organfast.probability import enlarge as enlarge
    from organfast.refinement import Refine as Refine
    from organfast.results import Result as Result
    from organfast.sampling import Split as Split
    from organfast.scorebook import Evaluation as Evaluation
    from organfast.segmentation import Cleaning as Cleaning
    from organfast.volume import Volume as Volume

_HOMES = {
    "Adapt": "organfast.adaptation",
    "Augmentation": "organfast.augmentation",
    "BatchPlan": "organfast.batch",
    "Block": "organfast.blocks",
    "ClassTable": "organfast.anatomy",
    "Cleaning": "organfast.segmentation",
    "Context": "organfast.blocks",
    "Evaluation": "organfast.scorebook",
    "ForestSettings": "organfast.models.forest",
    "InputError": "organfast.errors",
    "Model": "organfast.models.classifier",
    "ModelGrid": "organfast.grid",
    "NetworkRecipe": "organfast.networklearning",
    "Organ": "organfast.organs",
    "Outcome": "organfast.batchworker",
    "Outputs": "organfast.batchworker",
    "Recipe": "organfast.learning",
    "Refine": "organfast.refinement",
    "Result": "organfast.results",
    "Sampling": "organfast.learning",
    "Scoring": "organfast.evaluation",
    "Settings": "organfast.pipeline",
    "Split": "organfast.sampling",
    "Structure": "organfast.anatomy",
    "Volume": "organfast.volume",
    "block_views": "organfast.blocks",
    "cross_validate": "organfast.evaluation",
    "enlarge": "organfast.probability",
    "evaluate": "organfast.evaluation",
    "export_model": "organfast.models.export",
    "find_cases": "organfast.layouts",
    "gather_blocks": "organfast.blocks",
    "load_model": "organfast.models.classifier",
    "locate": "organfast.pipeline",
    "save_model": "organfast.models.classifier",
    "segment": "organfast.pipeline",
    "segment_batch": "organfast.batch",
    "segment_many": "organfast.pipeline",
    "train": "organfast.learning",
}

__version__ = version("organfast")
__all__ = [
    "Adapt",
    "Augmentation",
    "BatchPlan",
    "Block",
    "ClassTable",
    "Cleaning",
    "Context",
    "Evaluation",
    "ForestSettings",
    "InputError",
    "Model",
    "ModelGrid",
    "NetworkRecipe",
    "Organ",
    "Outcome",
    "Outputs",
    "Recipe",
    "Refine",
    "Result",
    "Sampling",
    "Scoring",
    "Settings",
    "Split",
    "Structure",
    "Volume",
    "block_views",
    "cross_validate",
    "enlarge",
    "evaluate",
    "export_model",
    "find_cases",
    "gather_blocks",
    "load_model",
    "locate",
    "save_model",
    "segment",
    "segment_batch",
    "segment_many",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
