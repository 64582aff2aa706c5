"""Data: rows of any common format, images, views, pairs, conversations, streams, the Scenes generator."""

from mllm_vision.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "load_records": "records.records",
        "bind_columns": "records.columns",
        "BadImage": "images.files",
        "ImageTransform": "images.transforms",
        "load_image": "images.decoding",
        "BadRow": "records.sampling",
        "BadSamples": "records.sampling",
        "EpochCallback": "records.sampling",
        "PairCollator": "pairs",
        "PairDataset": "pairs",
        "ImageCollator": "images.dataset",
        "ImageDataset": "images.dataset",
        "ViewArguments": "views.views",
        "ViewMaker": "views.views",
        "CHAT_TEMPLATES": "chat.templates",
        "ConversationCollator": "chat.collate",
        "ConversationDataset": "chat.conversations",
        "PackedConversations": "chat.packing",
        "bind_conversations": "records.forms",
        "preview_labels": "chat.collate",
        "to_messages": "records.forms",
        "Stream": "streams.streams",
        "StreamArguments": "streams.flags",
        "StreamDataset": "streams.streams",
        "StreamLoader": "streams.loader",
    },
)
