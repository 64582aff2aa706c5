"""Losses and measures as pure functions: tensors in, tensors out, no state.

The losses are in `image_text` (softmax and sigmoid over images and texts), `momentum_contrast` (ITC), `infonce`
(InfoNCE, NT-Xent, DCL, SupCon and the bound they give), `pairs` (contrastive, triplet and triplet mining),
`redundancy` (Barlow Twins, VICReg), `distillation` (cosine, DINO, iBOT, KoLeo), `prototypes` (k-means, ProtoNCE) and
`reconstruction` (masked pixels); `geometry` measures how embeddings fill their space. Losses that compare all pairs of
a batch share the tiled engine in `engine/`.
"""
