"""Recipes: what neighbouring papers do with a model's inside, on patchlab's nouns. One file per paper.

Each measures one number or a few beside the paper's own, with its control, and says where the claim does not show.

    >>> from patchlab.recipes import RECIPES
    >>> "voids" in RECIPES
    True
"""

from patchlab.recipes import attention_concentration as attention_concentration
from patchlab.recipes import das as das
from patchlab.recipes import depth_use as depth_use
from patchlab.recipes import layer_by_layer as layer_by_layer
from patchlab.recipes import layer_ranking as layer_ranking
from patchlab.recipes import llm_microscope as llm_microscope
from patchlab.recipes import mint as mint
from patchlab.recipes import multi_layer_sae as multi_layer_sae
from patchlab.recipes import second_order as second_order
from patchlab.recipes import voids as voids
from patchlab.recipes.recipe import RECIPES, Inputs, Number, Outcome, Recipe, RecipeResult, get_recipe, recipe

__all__ = ["RECIPES", "Inputs", "Number", "Outcome", "Recipe", "RecipeResult", "get_recipe", "recipe"]
