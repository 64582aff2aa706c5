"""The mathematics of the losses and of the measures: tensors in, tensors out, no state.

The modules are `image_text` (softmax and sigmoid image-text losses) and `geometry` (how a cloud of
embeddings fills its space).
"""
