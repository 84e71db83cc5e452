"""Recipes: what a paper does with a model's inside, as one function on patchlab's nouns, with its numbers, its control and its figures."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from patchlab import texts as corpora
from patchlab.errors import RecipeError, unknown
from patchlab.grammar import enter
from patchlab.models import Model, load_model
from patchlab.plots import save
from patchlab.stats.agreement import spearman
from patchlab.store.files import write_json
from patchlab.tables import table
from patchlab.tasks import Task, load_task
from patchlab.texts import Texts

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Inputs:
    """What a recipe is run on.

    Args:
        model: the model.
        other: a second model that reads the same tokens, for recipes that compare two; default ``demo-gpt2-4l`` beside the packaged ``demo-gpt2``.
        file: a text file in UTF-8, for recipes that look at many tokens; default the sentences that the packaged models were trained on.
        scale: multiplies numbers of prompts and texts.
        seed: of prompts, texts and draws.
    """

    model: Model
    other: Model | None = None
    file: str | os.PathLike[str] | None = None
    scale: float | int = 1.0
    seed: int = 1

    def texts(self, n: int, *, model: Model | None = None) -> Texts:
        """Rows of tokens: of the file, or of the packaged models' sentences.

        Raises:
            TextError: neither fits the model.
        """
        reader, count = model or self.model, max(8, round(n * self.scale))
        return corpora.sentences(reader, count, seed=self.seed) if self.file is None else corpora.read(Path(self.file), reader)[:count]

    def task(self, name: str, n: int, *, model: Model | None = None, **options: Any) -> Task:
        """Prompt pairs of a generator.

        Raises:
            TaskError: the generator's words are not in the model's vocabulary.
        """
        return load_task(name, model or self.model, n=max(8, round(n * self.scale)), seed=self.seed, **options)

    @cached_property
    def second(self) -> Model | None:
        """The second model; None where none is given or known."""
        return load_model("demo-gpt2-4l", device=str(self.model.device)) if self.other is None and self.model.name == "demo-gpt2" else self.other


@dataclass(frozen=True)
class Number:
    """One number that a recipe measures.

    Args:
        what: in words, with its unit.
        value: here.
        published: the paper's own, in words; "unknown" where it is not known.
        control: the same for what should not show the effect; NaN where there is none.
        control_is: the control in words.
    """

    what: str
    value: float | int
    published: str = UNKNOWN
    control: float | int = math.nan
    control_is: str = ""

    def row(self) -> dict[str, Any]:
        """As a row of a table."""
        control = "" if math.isnan(self.control) else f"{_short(self.control)} ({self.control_is})"
        return {"number": self.what, "here": _short(self.value), "control": control, "published": self.published}


def _short(value: float | int) -> str:
    return f"{value:.3g}".replace("-", "−") if math.isfinite(value) else "undefined"


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a recipe found.

    Attributes:
        numbers: with the published ones and the controls.
        reproduces: whether the paper's claim shows on this model; None where it could not be tried.
        verdict: a sentence that says so, and what does not.
        figures: by name.
    """

    numbers: tuple[Number, ...]
    reproduces: bool | None
    verdict: str
    figures: Mapping[str, go.Figure] = field(default_factory=dict[str, go.Figure], repr=False)


@dataclass(frozen=True, eq=False)
class RecipeResult:
    """An outcome with the recipe and the model that it is of."""

    recipe: "Recipe"
    subject: str
    outcome: Outcome

    def summary(self, width: int | None = None) -> str:
        """The claim, the numbers beside the paper's and the controls', and whether the claim shows here."""
        rows = pd.DataFrame([number.row() for number in self.outcome.numbers])
        said = {True: "reproduces here", False: "DOES NOT reproduce here", None: "could not be tried here"}[self.outcome.reproduces]
        lines = [f"{self.recipe.name} on {self.subject}: {self.recipe.paper}", f"Claim: {self.recipe.claim}", "", table(rows, width, keys=1), ""]
        return "\n".join([*lines, f"The claim {said}. {self.outcome.verdict}"])

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        numbers = [{key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in asdict(n).items()} for n in self.outcome.numbers]
        about = {"recipe": self.recipe.name, "paper": self.recipe.paper, "claim": self.recipe.claim, "subject": self.subject}
        return {**about, "numbers": numbers, "reproduces": self.outcome.reproduces, "verdict": self.outcome.verdict}

    def write(self, folder: Path) -> None:
        """Write ``result.json``, ``summary.txt`` and a page per figure into a folder."""
        write_json(folder / "result.json", self.to_dict())
        (folder / "summary.txt").write_text(self.summary() + "\n", encoding="utf-8")
        for name, figure in self.outcome.figures.items():
            save(figure, folder / f"{name}.html", include_plotlyjs="directory")


@dataclass(frozen=True)
class Recipe:
    """A paper's method as a function of inputs.

    Args:
        name: of the recipe.
        paper: title or authors, year, number.
        claim: what the paper finds, in a sentence.
        function: runs it.
    """

    name: str
    paper: str
    claim: str
    function: Callable[[Inputs], Outcome] = field(repr=False)

    def run(self, inputs: Inputs | Model) -> RecipeResult:
        """Run it on inputs, or on a model with the defaults.

        Raises:
            PatchlabError: prompts, texts or sites that the model lacks.
        """
        given = Inputs(inputs) if isinstance(inputs, Model) else inputs
        return RecipeResult(self, given.model.name, self.function(given))


RECIPES: dict[str, Recipe] = {}
"""The recipes by name."""


def recipe(name: str, *, paper: str, claim: str) -> Callable[[Callable[[Inputs], Outcome]], Callable[[Inputs], Outcome]]:
    """Decorator that registers a function of inputs as a recipe.

    Raises:
        RecipeError: the name is taken or malformed.
    """

    def register(function: Callable[[Inputs], Outcome]) -> Callable[[Inputs], Outcome]:
        enter(RECIPES, "recipe", name, Recipe(name, paper, claim, function), RecipeError)
        return function

    return register


def get_recipe(name: str) -> Recipe:
    """A recipe by its name.

    Raises:
        RecipeError: there is none.
    """
    if name not in RECIPES:
        raise RecipeError(unknown("recipe", name, RECIPES, more="patchlab recipes lists them."))
    return RECIPES[name]


def rank_correlation(first: Iterable[float | int], second: Iterable[float | int]) -> float:
    """Spearman's correlation of two lists; NaN where one is constant."""
    a, b = (np.asarray(list(values), dtype=float)[None] for values in (first, second))
    return math.nan if np.ptp(a) == 0 or np.ptp(b) == 0 else float(spearman(a, b)[0])
