"""Recipes: their schema, reading them with every mistake named, finding them and their prompts."""

from quantkit.recipe.load import LoadedRecipe, load_recipe, recipe_of
from quantkit.recipe.locate import find_prompts, find_recipe, list_recipes
from quantkit.recipe.prompts import Prompt, read_prompts
from quantkit.recipe.schema import Recipe

__all__ = [
    "LoadedRecipe",
    "Prompt",
    "Recipe",
    "find_prompts",
    "find_recipe",
    "list_recipes",
    "load_recipe",
    "read_prompts",
    "recipe_of",
]
