"""Argument names in a docstring (after Heimersheim and Janiak 2023, "A circuit for Python docstrings")."""

from collections.abc import Iterator
from random import Random

from patchlab.tasks.generators.lexicon import Lexicon
from patchlab.tasks.generators.words import ARGUMENTS, COMMON, FUNCTIONS
from patchlab.tasks.registry import generator
from patchlab.tasks.task import Pair

TEMPLATE = (
    "def {FUNCTION}(self, {A_DEF}, {B_DEF}, {C_DEF}, {D_DEF}):\n"
    '    """ {w1} {w2}\n\n'
    "    :param {A_DOC}: {w3} {w4}\n"
    "    :param {B_DOC}: {w5} {w6}\n"
    "    :param"
)


@generator("docstring", corruption=("swap", "rename"))
def docstring(words: Lexicon, rng: Random, *, corruption: str = "swap") -> Iterator[Pair]:
    """Python: "def load(self, size, name, file, user): ... :param size: ... :param name: ... :param" -> file.

    ``corruption``: swap exchanges the third and the fourth argument in the signature, so that the same tokens in another order
    give the other answer; rename puts a new name in the place of the third.
    """
    functions, arguments = words.words(FUNCTIONS, "function names", at_least=1), words.words(ARGUMENTS, "argument names", at_least=5)
    common = words.words(COMMON, "common words", at_least=6)
    while True:
        a, b, c, d, new = rng.sample(arguments, 5)
        clean = {"FUNCTION": rng.choice(functions), "A_DEF": a, "B_DEF": b, "C_DEF": c, "D_DEF": d, "A_DOC": a, "B_DOC": b}
        clean |= {f"w{i}": word for i, word in enumerate(rng.sample(common, 6), start=1)}
        corrupted, wrong = ({"C_DEF": d, "D_DEF": c}, d) if corruption == "swap" else ({"C_DEF": new}, new)
        yield words.pair(TEMPLATE, clean, corrupted, [" " + c], [" " + wrong], name="params")
