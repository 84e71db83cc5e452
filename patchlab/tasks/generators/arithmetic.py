"""Sums and differences in words (as in Nikankin et al. 2024, arXiv 2410.21272, and the arithmetic task of MIB, arXiv 2504.13151)."""

from collections.abc import Iterator
from random import Random

from patchlab.errors import TaskError
from patchlab.tasks.generators.lexicon import Lexicon
from patchlab.tasks.registry import generator
from patchlab.tasks.task import Pair

TEMPLATES = {
    "sum": {"add": "The sum of {A} and {B} is", "subtract": "The difference between {A} and {B} is"},
    "words": {"add": "{A} plus {B} is", "subtract": "{A} minus {B} is"},
    "symbols": {"add": "{A} + {B} =", "subtract": "{A} - {B} ="},
}
OPERATIONS = {"add": lambda a, b: a + b, "subtract": lambda a, b: a - b}


@generator("arithmetic", operation=OPERATIONS, template=TEMPLATES)
def arithmetic(words: Lexicon, rng: Random, *, operation: str = "add", template: str = "sum", digits: int = 2) -> Iterator[Pair]:
    """Arithmetic: "The sum of 13 and 25 is" -> 38.

    ``operation``: add, or subtract (the smaller number from the larger). ``template``: sum, words ("13 plus 25 is") or symbols ("13 + 25 =").
    Operands have at most ``digits`` digits, and they and the results are one token each; the space before a number belongs to its token or to
    the prompt, as the tokenizer has it. The corruption has other operands and another result. Positions A and B are the operands.
    """
    if not 1 <= digits <= 3:
        raise TaskError(f"digits is {digits}; arithmetic has operands of 1 to 3 digits.")
    largest = 10**digits - 1
    candidates = [str(number) for number in range(2 * largest + 1)]
    spaced = {number for number in candidates if words.is_single(f" {number}")}
    bare = {number for number in candidates if words.is_single(number)}
    # a tokenizer that gives the space a token of its own: the prompt ends in it
    apart = any((ids := words.encode(f" {number}")) is not None and len(ids) == 2 and ids[1:] == words.encode(number) for number in bare)
    known = {int(number) for number in (bare if apart else spaced)}
    # a number that begins the prompt has no space
    first = known if apart or template == "sum" else known & {int(number) for number in bare}
    operate, operands = OPERATIONS[operation], range(largest + 1)
    results = {(a, b): operate(a, b) for a in operands if a in first for b in operands if b in known and operate(a, b) in known}
    if largest not in known or len(set(results.values())) < 2:
        raise TaskError(
            f"the tokenizer of {words.model_name} has {len(known)} of the numbers 0 to {2 * largest} as single tokens, and this task needs "
            f"operands of {digits} digits and results that are one token each. Take digits=1 where it splits numbers into digits, or a task file of "
            f"your own."
        )
    text = TEMPLATES[template][operation]
    text = text.replace("{A}", "{A!}").replace("{B}", "{B!}") + " " if apart else text
    space, pairs = "" if apart else " ", list(results)
    while True:
        (a, b), (c, d) = rng.sample(pairs, 2)
        right, wrong = (f"{space}{results[one]}" for one in ((a, b), (c, d)))
        if right != wrong:
            yield words.pair(text, {"A": str(a), "B": str(b)}, {"A": str(c), "B": str(d)}, [right], [wrong], name=f"{template}.{operation}")
