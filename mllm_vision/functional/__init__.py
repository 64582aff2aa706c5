"""The mathematics of the losses and of the measures: tensors in, tensors out, no state.

The modules are `image_text` (softmax and sigmoid image-text losses), `infonce` (InfoNCE, NT-Xent and the bound they
give) and `geometry` (how a cloud of embeddings fills its space). The losses share a tiled engine: `tiles`,
`softmax_tiles`, `sigmoid_tiles`, `products`.
"""
