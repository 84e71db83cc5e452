"""Multiple choice about the colour of an object (after the CopyColors task of Wiegreffe et al. 2024, arXiv 2407.15018, which MIB uses)."""

from collections.abc import Iterator
from random import Random

from patchlab.errors import TaskError
from patchlab.tasks.generators.lexicon import Lexicon
from patchlab.tasks.generators.words import COLOURED, COLOURS
from patchlab.tasks.registry import generator
from patchlab.tasks.task import Pair

SYMBOLS = "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z".split()  # noqa: SIM905  (a list of letters reads better as one string)


@generator("coloured_objects", corruption=("symbol", "position", "colour"), incorrect=("counterfactual", "others"))
def coloured_objects(
    words: Lexicon, rng: Random, *, corruption: str = "symbol", incorrect: str = "counterfactual", choices: int = 4
) -> Iterator[Pair]:
    """Multiple choice: "The box is brown. What color is the box? A. gray B. brown ... Answer:" -> B.

    ``choices``: how many, 2 to 8. ``corruption``: symbol names the choices by other letters; position exchanges the right choice with another one;
    colour says another of the colours, so that the answer turns round. ``incorrect``: the letter that is right in the corrupted prompt, or all
    others of the clean one. Letters, colours and objects are one token each.
    """
    if not 2 <= choices <= 8:
        raise TaskError(f"choices is {choices}; a question of coloured_objects has 2 to 8 choices.")
    letters = [letter for letter in words.words(SYMBOLS, "letters", at_least=2 * choices) if words.is_single(letter)]
    if len(letters) < 2 * choices:
        raise TaskError(
            f"only {len(letters)} letters are single tokens with and without a space for the tokenizer of {words.model_name}, and {choices} choices "
            f"need {2 * choices}. Ask for fewer choices, or use a task file of your own."
        )
    colours, objects = words.words(COLOURS, "colours", at_least=choices), words.words(COLOURED, "objects", at_least=1)
    lines = "".join(f"\n{{L{i}}}. {{C{i}}}" for i in range(choices))
    template = f"The {{OBJECT}} is {{COLOUR}}. What color is the {{object}}?{lines}\nAnswer:"
    while True:
        thing, shown = rng.choice(objects), rng.sample(colours, choices)
        named = rng.sample(letters, 2 * choices)
        right, other = rng.sample(range(choices), 2)
        clean = {"OBJECT": thing, "object": thing, "COLOUR": shown[right]} | {f"L{i}": named[i] for i in range(choices)}
        clean |= {f"C{i}": colour for i, colour in enumerate(shown)}
        if corruption == "symbol":
            changed, wrong = {f"L{i}": named[choices + i] for i in range(choices)}, named[choices + right]
        elif corruption == "position":
            changed, wrong = {f"C{right}": shown[other], f"C{other}": shown[right]}, named[other]
        else:
            changed, wrong = {"COLOUR": shown[other]}, named[other]
        others = [wrong] if incorrect == "counterfactual" else [letter for letter in named[:choices] if letter != named[right]]
        answers = [f" {named[right]}"], [f" {letter}" for letter in others]
        yield words.pair(template, clean, changed, *answers, name=f"{choices} choices")
