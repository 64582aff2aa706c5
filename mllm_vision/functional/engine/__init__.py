"""The tiled engine under the contrastive losses: exact softmax and sigmoid without the matrix of all pairs."""
