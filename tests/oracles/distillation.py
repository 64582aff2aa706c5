"""DINO, iBOT, Sinkhorn-Knopp, KoLeo and BYOL's distance from the papers: float64 numpy, one pair at a time."""

from __future__ import annotations

import numpy as np


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def byol(p, z):
    """Equation 2 of Grill et al. 2020: the squared distance of unit vectors, averaged over rows."""
    total = 0.0
    for a, b in zip(p, z, strict=True):
        total += ((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2).sum()
    return total / len(p)


def cross_entropy(student, teacher, temperature):
    """H(t, s) of one teacher distribution and one row of student logits."""
    z = student / temperature
    log_p = z - z.max() - np.log(np.exp(z - z.max()).sum())
    return -(teacher * log_p).sum()


def dino(student, teacher, temperature):
    """Equation 3 of Caron et al. 2021 over [N, V, K] and [N, G, K], as the official code divides it."""
    total, terms = 0.0, 0
    for row in range(len(student)):
        for seen in range(teacher.shape[1]):
            for view in range(student.shape[1]):
                if view != seen:
                    total += cross_entropy(student[row, view], teacher[row, seen], temperature)
                    terms += 1
    return total / terms


def ibot(student, teacher, mask, temperature):
    """Equation 2 of Zhou et al. 2022 over [N, P, K]: mean over a view's masked patches, then over all views."""
    total = 0.0
    for view in range(len(student)):
        masked = [patch for patch in range(mask.shape[1]) if mask[view, patch]]
        each = [cross_entropy(student[view, patch], teacher[view, patch], temperature) for patch in masked]
        total += sum(each) / max(1, len(masked))
    return total / len(student)


def sinkhorn(logits, temperature, iterations):
    """SwAV's appendix A as printed: Q is prototypes by samples, of total mass one."""
    q = np.exp(logits / temperature).T
    k, b = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q = q / q.sum(axis=1, keepdims=True) / k
        q = q / q.sum(axis=0, keepdims=True) / b
    return (q * b).T


def cosines(features):
    """Of all pairs of rows."""
    x = features / np.linalg.norm(features, axis=1, keepdims=True)
    return x @ x.T


def koleo(features, eps=1e-8):
    """The official loop: nearest neighbour among the other rows, minus the logarithm of the distance to it."""
    x = [row / max(np.linalg.norm(row), eps) for row in features]
    total = 0.0
    for i, row in enumerate(x):
        others = [j for j in range(len(x)) if j != i]
        j = max(others, key=lambda other: row @ x[other]) if others else i
        total -= np.log(np.linalg.norm(row - x[j] + eps) + eps)
    return total / len(x)


class LinearDino:
    """The whole method with a linear student and no crops but the two: algorithm 1 of the paper, step by step."""

    def __init__(self, weight, *, centre_momentum, momentum, student_temperature, teacher_temperature, rate):
        self.student, self.teacher = weight.copy(), weight.copy()
        self.centre = np.zeros(len(weight))
        self.centre_momentum, self.momentum, self.rate = centre_momentum, momentum, rate
        self.hot, self.cold = student_temperature, teacher_temperature

    def step(self, x1, x2):
        """One step on two views [N, D]; the loss, computed with the centre before it moves."""
        n = len(x1)
        said = [x @ self.student.T for x in (x1, x2)]
        taught = [x @ self.teacher.T for x in (x1, x2)]
        gradient, loss = np.zeros_like(self.student), 0.0
        for x, s, t in ((x2, said[1], taught[0]), (x1, said[0], taught[1])):
            for row in range(n):
                target = softmax((t[row] - self.centre) / self.cold)
                loss += cross_entropy(s[row], target, self.hot) / (2 * n)
                gradient += np.outer(softmax(s[row] / self.hot) - target, x[row]) / self.hot / (2 * n)
        self.student -= self.rate * gradient
        mean = np.concatenate(taught).mean(axis=0)
        self.centre = self.centre_momentum * self.centre + (1 - self.centre_momentum) * mean
        self.teacher = self.momentum * self.teacher + (1 - self.momentum) * self.student
        return loss
