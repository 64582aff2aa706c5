"""PCL from the official code (salesforce/PCL: builder.py, main_pcl.py).

As documented: spherical k-means over keys of the key encoder that the epoch begins with, all prototypes as negatives,
no concentration below a tenth of the temperature, and the queue of `moco`.

As documented, the cosine moves with every step, where it moves once an epoch there.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from . import cosine, follow, mlp, moco, unit, vectors


def _kmeans(rows, k, seed, iterations, restarts):
    generator, best = torch.Generator().manual_seed(seed), None
    for _ in range(restarts):
        centroids = rows[torch.randperm(len(rows), generator=generator)[:k]]
        for _ in range(iterations):
            assigned = (rows @ centroids.T).argmax(1)
            centroids = torch.stack([unit(rows[assigned == number].sum(0)) for number in range(k)])
        fit = (rows @ centroids.T).max(1).values.mean()
        if best is None or fit > best[0]:
            best = fit, centroids, (rows @ centroids.T).argmax(1)
    return best[1:]


def _density(rows, centroids, assigned, temperature):
    density = np.zeros(len(centroids))
    for number, centroid in enumerate(centroids):
        distances = (rows[assigned == number] - centroid).norm(dim=1).numpy()
        if len(distances) > 1:
            density[number] = distances.mean() / np.log(len(distances) + 10)
    sizes = torch.bincount(assigned, minlength=len(centroids)).numpy()
    density[sizes <= 1] = density.max()
    density = density.clip(np.percentile(density, 10), np.percentile(density, 90))
    return torch.tensor(temperature * density / density.mean()).clamp_min(temperature / 10)


def _proto(query, centroids, density, assigned):
    others = [number for number in range(len(centroids)) if number not in set(assigned.tolist())]
    chosen = torch.cat([assigned, torch.tensor(others, dtype=torch.long)])
    return F.cross_entropy(query @ centroids[chosen].T / density[chosen], torch.arange(len(query)))


def train(start, batches, given):
    head = mlp(given["width"], given["width"], given["dim"], biases=(True, True), norm=False)
    fast, slow = moco.networks(start, head, 1)
    queue, losses, clusters = moco.Queue(given["queue_size"]), [], []
    optimizer = torch.optim.SGD(fast.parameters(), given["rate"], momentum=0.9, weight_decay=given["weight_decay"])
    every = given["steps_per_epoch"]
    images = torch.stack([row["views"][0] for row in given["rows"]])
    for step, batch in enumerate(batches):
        follow(slow, fast, given["momentum"])
        if step % every == 0 and step / every >= given["prototype_warmup_epochs"]:
            with torch.no_grad():
                slow.eval()
                rows = unit(slow[1](vectors(slow[0], images)))
                slow.train()
            clusters = []
            for seed, k in enumerate(given["num_clusters"]):
                centroids, assigned = _kmeans(rows, k, seed, given["kmeans_iterations"], given["kmeans_restarts"])
                density = _density(rows, centroids, assigned, given["temperature"])
                clusters.append((centroids.float().double(), density.float().double(), assigned))  # kept in fp32
        set_to = cosine(given["rate"], 0.0, step / len(batches))
        optimizer.param_groups[0]["lr"] = set_to
        first, second = batch["views"].unbind(1)
        query = unit(fast[1](vectors(fast[0], first)))
        with torch.no_grad():
            key = unit(slow[1](vectors(slow[0], second)))
        loss = moco.contrast(query, key, queue, given["temperature"])
        parts = [_proto(query, centres, density, assigned[batch["index"]]) for centres, density, assigned in clusters]
        loss = loss + sum(parts) / max(len(parts), 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue.add(key)
        losses.append(loss.item())
    follow(slow, fast, given["momentum"])
    return losses, moco.state_of(fast, slow)
