"""The public surface: its names, and docstrings that say what the signatures say."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import organfast

PACKAGE = Path(organfast.__file__).parent

FROZEN = [
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

# Wishes about how to work, not about what to do: they do not count as parameters.
ASIDE = {"threads", "progress"}
MOST = 6


def modules() -> list[str]:
    """Every module but the compiled kernels, whose door is the module beside them, and the
    command line, whose parameters are its --help."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in ("kernels", "cli", "__main__") and parts[-1] != "__init__":
            found.append(".".join(("organfast", *parts)))
    return found


MODULES = [pytest.param(name, id=name.removeprefix("organfast.")) for name in modules()]


def callables(module_name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public functions and classes that a module defines, and the public methods of the classes."""
    module = import_module(module_name)
    for name in module.__all__:
        thing = getattr(module, name)
        if getattr(thing, "__module__", None) != module_name or not callable(thing):
            continue
        yield name, thing
        if inspect.isclass(thing):
            for method_name, method in vars(thing).items():
                function = getattr(method, "__func__", method)
                if isinstance(function, FunctionType) and not method_name.startswith("_"):
                    yield f"{name}.{method_name}", function


def is_protocol(thing: Any) -> bool:
    return getattr(thing, "_is_protocol", False)


def signature_names(thing: Callable[..., Any]) -> list[str]:
    """Parameters, in order, without self."""
    if inspect.isclass(thing) and dataclasses.is_dataclass(thing):
        return [f.name for f in dataclasses.fields(thing) if f.init]
    if inspect.isclass(thing) and type(thing).__call__ is not type.__call__:
        thing = thing.__init__  # flax calls its modules by a metaclass, which takes anything
    parameters = inspect.signature(thing).parameters
    return [name for name in parameters if name not in ("self", "cls")]


def documented_names(thing: Callable[..., Any]) -> list[str] | None:
    """Names in the docstring's Parameters section, in order; None where it has none.

    A row is ``name : type``, ``one, other : type`` or, where the type is said elsewhere, ``name``.
    """
    text = inspect.cleandoc(thing.__doc__ or "")
    section = re.search(r"^Parameters\n-{10}\n(.*?)(?=^\S[^\n]*\n-{3,}\n|\Z)", text, re.M | re.S)
    if section is None:
        return None
    rows = re.findall(r"^(\w+(?:, \w+)*)(?: : .+)?$", section[1], re.M)
    return [name for row in rows for name in row.split(", ")]


# --- the checker itself ---------------------------------------------------------------------------


def test_the_checker_sees_rows_sections_and_what_is_missing() -> None:
    def good(a: int, b: int, *, c: int) -> None:
        """One line.

        Parameters
        ----------
        a, b : int
            Words: with a colon
            over two lines.
        c
            More.

        Returns
        -------
        d : int
            No parameter.
        """

    def bare(a: int) -> None:
        """One line."""

    assert documented_names(good) == signature_names(good) == ["a", "b", "c"]
    assert documented_names(bare) is None
    assert signature_names(bare) == ["a"]


def test_the_checker_sees_the_surface() -> None:
    seen = {name for module in modules() for name, _ in callables(module)}
    assert {"segment", "Result.save", "Block.from_dict", "Forest.probabilities"} <= seen
    assert set(FROZEN) <= seen


# --- the surface ----------------------------------------------------------------------------------


def test_public_names_are_frozen() -> None:
    assert organfast.__all__ == FROZEN == sorted(FROZEN)


def test_every_public_name_is_there_and_at_home() -> None:
    for name in organfast.__all__:
        thing = getattr(organfast, name)
        assert name in import_module(thing.__module__).__all__
        assert name in dir(organfast)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        organfast.nothing  # noqa: B018
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", organfast.__version__)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_lists_what_it_has(module: str) -> None:
    names = import_module(module).__all__
    assert len(set(names)) == len(names)
    for name in names:
        assert hasattr(import_module(module), name), name
        assert not name.startswith("_"), name


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_name_the_parameters_of_the_signature(module: str) -> None:
    for name, thing in callables(module):
        assert thing.__doc__, f"{name} has no docstring"
        documented, expected = documented_names(thing), signature_names(thing)
        if documented is None:
            # A method may leave its parameters to its one line; a protocol's are its properties.
            is_exempt = "." in name or is_protocol(thing)
            assert is_exempt or not expected, f"{name} has no Parameters"
        else:
            assert documented == expected, name


@pytest.mark.parametrize("module", MODULES)
def test_properties_say_what_they_are(module: str) -> None:
    for name, thing in callables(module):
        if not inspect.isclass(thing):
            continue
        for attribute, value in vars(thing).items():
            if isinstance(value, (property, cached_property)) and not attribute.startswith("_"):
                assert value.__doc__, f"{name}.{attribute} has no docstring"


@pytest.mark.parametrize("module", MODULES)
def test_at_most_six_parameters(module: str) -> None:
    for name, thing in callables(module):
        if not inspect.isclass(thing):  # the fields of a class are its content
            counted = [p for p in signature_names(thing) if p not in ASIDE]
            assert len(counted) <= MOST, f"{name} takes {counted}"
