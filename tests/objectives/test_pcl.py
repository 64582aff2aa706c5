"""PCL: InfoNCE alone at first, then k-means of the momentum features each epoch, and the prototypes' part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from linear_encoder import make_method, tiny_encoder, view_batch
from oracles import prototypes as oracle

from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer

ROWS = 24


def pcl(**config):
    return make_method(
        "pcl", num_clusters=[3, 5], **{"prototype_warmup_epochs": 2.0, "queue_size": 8, **config}
    ).train()


def batch(rows=4, seed=0):
    return view_batch(rows, seed) | {"index": torch.arange(rows) * 5}


def test_the_first_epochs_are_moco_v2():
    objective, moco = pcl(), make_method("moco_v2", temperature=0.2, head_hidden=None, queue_size=8).train()
    moco.load_state_dict(objective.state_dict(), strict=False)
    objective.before_training(ROWS, 4)
    objective.epoch = 1.5
    assert not objective.features_due
    objective.before_epoch(torch.randn(ROWS, 12))  # not yet
    for seed in range(3):
        given = batch(seed=seed)
        columns = {name: given[name] for name in ("views", "seeds")}
        assert objective(**given).loss.item() == pytest.approx(moco(**columns).loss.item(), rel=1e-6)
        for each in (objective, moco):
            each.after_step(0.1)
    assert set(objective(**given).metrics).isdisjoint({"proto_nce"})


def test_prototypes_and_their_part_of_the_loss():
    objective = pcl(temperature=0.3, prototype_weight=0.5)
    objective.before_training(ROWS, 4)
    objective.epoch = 2.0
    features = F.normalize(torch.randn(ROWS, 12), dim=1)
    objective.before_epoch(features)
    given = batch()
    embeddings = objective.embed(**given)
    output = objective.loss(embeddings)
    clusterings = []
    for number, k in enumerate((3, 5)):
        centroids, phi, assigned = (
            objective.get_buffer(f"{name}_{number}").double().numpy()
            for name in ("prototypes", "concentration", "cluster_of")
        )
        assert centroids.shape == (k, 12) and assigned.shape == (ROWS,)
        np.testing.assert_array_equal(assigned, (features.double().numpy() @ centroids.T).argmax(1))
        expected = oracle.concentration(features.double().numpy(), centroids, assigned, 0.3)
        np.testing.assert_allclose(phi, expected, rtol=1e-5)
        clusterings.append((centroids, phi, assigned[given["index"].numpy()].astype(int)))
    query = embeddings["query"][:, 0].detach().double().numpy()
    among = oracle.proto_nce(query, clusterings, repeats=True)
    assert output.metrics["proto_nce"].item() == pytest.approx(among, rel=1e-5)
    assert output.loss.item() == pytest.approx(output.metrics["info_nce"].item() + 0.5 * among, rel=1e-5)
    assert objective.chance_loss(4) is None


def test_clusters_are_part_of_a_checkpoint():
    objective, resumed = pcl(prototype_warmup_epochs=0), pcl(prototype_warmup_epochs=0)
    for each in (objective, resumed):
        each.before_training(ROWS, 4)
    objective.before_epoch(torch.randn(ROWS, 12))
    resumed.load_state_dict(objective.state_dict())
    assert resumed(**batch()).loss.item() == objective(**batch()).loss.item()
    ignored = set(objective._ddp_params_and_buffers_to_ignore)
    assert (
        {"prototypes_0", "concentration_1", "cluster_of_1", "queue.features"} <= ignored <= set(objective.state_dict())
    )


def test_it_is_the_momentum_encoder_whose_features_are_clustered():
    objective = pcl()
    with torch.no_grad():
        for value in objective.teacher.parameters():
            value.mul_(1.5)
    views = torch.randn(5, 1, 3, 32, 32)
    slow = objective.teacher.module
    expected = slow["head"](slow["encoder"](views[:, 0], tokens=False).pooled)
    torch.testing.assert_close(objective.epoch_features(views), expected)


class _Images(torch.utils.data.Dataset):
    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        views = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(row)).expand(2, 3, 32, 32)
        return {"views": views, "index": row, "seeds": row}


def test_a_training_clusters_before_each_epoch_from_the_second_on(tmp_path, monkeypatch):
    objective = pcl(prototype_warmup_epochs=1.0)
    seen, before_epoch = [], objective.before_epoch

    def watched(features):
        # what the momentum encoder says of the images, in the data's order, at this very moment
        plain = torch.stack([_Images()[row]["views"][:1] for row in range(ROWS)])
        with torch.no_grad():
            torch.testing.assert_close(features, objective.epoch_features(plain), rtol=1e-4, atol=1e-5)
        before_epoch(features)
        seen.append((objective.epoch, objective.prototypes_0.clone()))

    monkeypatch.setattr(objective, "before_epoch", watched)
    arguments = RecipeArguments(
        output_dir=str(tmp_path), num_train_epochs=3, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        save_strategy="no", optim="sgd", learning_rate=0.5,
    )  # fmt: skip
    trainer = ObjectiveTrainer(
        model=objective,
        args=arguments,
        train_dataset=_Images(),
        make_plain_views=lambda columns: columns | {"views": columns["views"][:, :1]},
    )
    trainer.train()
    assert [epoch for epoch, _ in seen] == [1.0, 2.0]
    assert not torch.equal(seen[0][1], seen[1][1])


def test_what_is_refused():
    with pytest.raises(ValueError, match="5 clusters of 4 images"):
        pcl(queue_size=2).before_training(4, 2)
    with pytest.raises(ValueError, match="num_clusters=\\[\\]"):
        make_method("pcl", num_clusters=[])
    with pytest.raises(ValueError, match="kmeans_restarts=0"):
        pcl(kmeans_restarts=0)
    with pytest.raises(ValueError, match="'index'"):
        pcl()(**view_batch(3))


def test_a_resnet_trains_too():
    objective = make_method("pcl", tiny_encoder("resnet"), num_clusters=[2], prototype_warmup_epochs=0).train()
    objective.before_training(ROWS, 4)
    objective.before_epoch(torch.randn(ROWS, 12))
    objective(**batch()).loss.backward()
    assert all(value.grad is not None for value in objective.parameters() if value.requires_grad)
