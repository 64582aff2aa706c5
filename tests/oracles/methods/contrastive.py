"""Hadsell et al. 2006, equation 4 without its halves, pair by pair; the pairs as the method's docstring names them."""

from __future__ import annotations

import torch

from . import labelled_loop


def batch_loss(z, labels, given):
    (first, second), labels = z.chunk(2), labels.tolist()
    rows, terms = len(labels), []
    for i in range(rows):
        partner = i  # alone in its class, or without one
        for step in range(1, rows + 1):
            j = (i + step) % rows
            if labels[i] >= 0 and labels[j] == labels[i]:
                partner = j
                break
        terms.append(((first[i] - second[partner]) ** 2).sum())
        j = (i + 1) % rows
        squared = ((first[i] - second[j]) ** 2).sum()
        similar = labels[i] >= 0 and labels[i] == labels[j]
        terms.append(squared if similar else torch.clamp(given["margin"] - squared.sqrt(), min=0) ** 2)
    return sum(terms) / len(terms)


def train(start, batches, given):
    return labelled_loop(start, batches, given, batch_loss)
