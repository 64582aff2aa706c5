"""mllm_vision: train vision encoders by contrast, connect them to a language model, measure every stage.

Public names are imported on first use: `import mllm_vision` does not import torch (docs/api.md).
"""

from mllm_vision.evaluation.registry import evaluator_homes
from mllm_vision.lazy import attach
from mllm_vision.objectives.registry import method_homes

__version__ = "0.3.0"

# public names by subject: name -> module
_SUBJECTS = {
    "Recipes": {
        "train": "api",
    },
    "Encoders": {
        "VisionEncoder": "encoder.encoder",
        "VisionFeatures": "encoder.features",
        "DualEncoder": "encoder.dual",
        "build_encoder": "encoder.sources",
        "build_backbone": "encoder.build",
        "list_encoders": "encoder.presets",
    },
    "Methods": {
        **method_homes(),
        "Objective": "objectives.base",
        "ImageObjective": "objectives.base",
        "ImageTextObjective": "objectives.image_text",
        "ObjectiveOutput": "objectives.base",
        "load_objective": "objectives.registry",
        "list_objectives": "objectives.registry",
    },
    "Losses": {
        "clip_loss": "functional.image_text",
        "siglip_loss": "functional.image_text",
        "nt_xent": "functional.infonce",
        "info_nce": "functional.infonce",
        "dcl": "functional.infonce",
        "sup_con": "functional.infonce",
        "mutual_information_bound": "functional.infonce",
        "momentum_contrast": "functional.momentum_contrast",
        "contrastive": "functional.pairs",
        "triplet": "functional.pairs",
        "batch_triplet": "functional.pairs",
        "mine_triplets": "functional.pairs",
        "barlow_twins": "functional.redundancy",
        "vicreg": "functional.redundancy",
        "negative_cosine": "functional.distillation",
        "dino_loss": "functional.distillation",
        "ibot_loss": "functional.distillation",
        "koleo": "functional.distillation",
        "proto_nce": "functional.prototypes",
        "masked_reconstruction": "functional.reconstruction",
    },
    "Data": {
        "load_records": "data.records.records",
        "bind_columns": "data.records.columns",
        "load_image": "data.images.decoding",
        "ImageTransform": "data.images.transforms",
        "ImageDataset": "data.images.dataset",
        "ImageCollator": "data.images.dataset",
        "PairDataset": "data.pairs",
        "PairCollator": "data.pairs",
        "ConversationDataset": "data.chat.conversations",
        "ConversationCollator": "data.chat.collate",
        "PackedConversations": "data.chat.packing",
        "ViewMaker": "data.views.views",
        "Stream": "data.streams.streams",
        "StreamDataset": "data.streams.streams",
        "StreamLoader": "data.streams.loader",
    },
    "Vision-language models": {
        "LanguageTask": "vlm.task",
        "System": "vlm.systems.base",
        "load_system": "vlm.systems.registry",
        "list_systems": "vlm.systems.registry",
        "build_vlm": "vlm.build",
        "load_vlm": "vlm.export",
        "save_vlm": "vlm.export",
    },
    "Evaluators": {
        **evaluator_homes(),
        "Evaluator": "evaluation.base",
        "LabelledImages": "evaluation.labelled.images",
        "ClassifierAccuracy": "evaluation.labelled.classifier",
        "HeldOutLoss": "vlm.measure",
        "load_evaluator": "evaluation.registry",
        "list_evaluators": "evaluation.registry",
    },
    "Training": {
        "ObjectiveTrainer": "training.trainer.objective_trainer",
        "RecipeTrainer": "training.trainer.recipe_trainer",
        "RecipeArguments": "training.recipe.arguments",
        "Run": "training.recipe.run",
        "parse_recipe": "training.recipe.parser",
        "run_recipe": "training.recipe.parser",
        "LARS": "training.optim.layerwise",
        "LAMB": "training.optim.layerwise",
        "WeightAverage": "training.callbacks.ema",
    },
    "Lineage": {
        "hash_weights": "hub.lineage",
        "read_lineage": "hub.lineage",
        "check_lineage": "hub.lineage",
    },
}

__getattr__, __dir__, __all__ = attach(
    __name__, {name: module for names in _SUBJECTS.values() for name, module in names.items()}
)
