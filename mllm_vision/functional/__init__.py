"""The mathematics of the losses and of the measures: tensors in, tensors out, no state.

The losses are in `image_text` (softmax and sigmoid over images and texts), `momentum_contrast` (ITC), `infonce`
(InfoNCE, NT-Xent, DCL, SupCon and the bound they give), `pairs` (contrastive, triplet and the mining of triplets),
`redundancy` (Barlow Twins, VICReg), `distillation` (cosine, DINO, iBOT, KoLeo), `prototypes` (k-means, ProtoNCE) and
`reconstruction` (masked pixels); `geometry` measures how a cloud of embeddings fills its space. Those that compare all
pairs of a batch share a tiled engine: `tiles`, `softmax_tiles`, `sigmoid_tiles`, `products`.
"""
