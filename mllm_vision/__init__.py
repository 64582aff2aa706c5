"""mllm_vision: train vision encoders by contrast, connect them to a language model, measure every stage.

The public names are imported when first used: `import mllm_vision` itself costs no torch import.
"""

from mllm_vision.lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "train": "api",
        "VisionEncoder": "encoder",
        "VisionFeatures": "encoder",
        "DualEncoder": "encoder.dual",
        "list_encoders": "encoder.presets",
        "Objective": "objectives",
        "ObjectiveOutput": "objectives",
        "load_objective": "objectives",
        "list_objectives": "objectives",
        "VisionLanguageModel": "vlm",
        "build_vlm": "vlm",
        "load_vlm": "vlm",
        "list_projectors": "modules.projectors",
        "build_projector": "modules.projectors",
        "load_records": "data.records.records",
        "bind_columns": "data.records.columns",
        "load_image": "data.images.decoding",
        "ImageTransform": "data.images.transforms",
        "parse_recipe": "training.recipe.parser",
        "recipe_dict": "training.recipe.parser",
        "run_recipe": "training.recipe.parser",
        "RecipeArguments": "training.recipe.arguments",
        "Run": "training.recipe.run",
        "RecipeTrainer": "training.trainer.recipe_trainer",
        "ObjectiveTrainer": "training.trainer.objective_trainer",
        "hash_weights": "hub.lineage",
        "read_lineage": "hub.lineage",
        "check_lineage": "hub.lineage",
    },
)
