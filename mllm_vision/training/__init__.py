"""Training: recipes parsed from flags and YAML, the run folder, the trainers, optimizers and checkpoints."""

from mllm_vision.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "parse_recipe": "recipe.parser",
        "peek_recipe": "recipe.parser",
        "recipe_dict": "recipe.parser",
        "run_recipe": "recipe.parser",
        "RecipeArguments": "recipe.arguments",
        "Run": "recipe.run",
        "RecipeTrainer": "trainer.recipe_trainer",
        "ObjectiveTrainer": "trainer.objective_trainer",
        "parameter_groups": "optim.optimizers",
        "LARS": "optim.layerwise",
        "LAMB": "optim.layerwise",
        "WeightAverage": "callbacks.ema",
    },
)
