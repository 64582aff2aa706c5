"""kNN and the linear probe: against the definition, an optimality condition, and what labels may look like."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Value

from mllm_vision.data import load_records
from mllm_vision.encoder import VisionEncoder
from mllm_vision.encoder.build import build_backbone
from mllm_vision.evaluation import Geometry, KnnAccuracy, LabelledImages, LinearProbe
from mllm_vision.evaluation.labelled.flags import LabelledArguments
from mllm_vision.evaluation.labelled.images import Labelled
from mllm_vision.evaluation.labelled.knn import knn_predict, nearest
from mllm_vision.evaluation.labelled.linear_probe import fit_linear, principal_axes


def clusters(rows: int, classes: int = 3, width: int = 8, seed: int = 0, noise: float = 1.0):
    """Features around one centre a class, strongly correlated and of very different scales, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99)) * 2
    labels = torch.arange(rows) % classes
    features = centres[labels] + noise * torch.randn(rows, width, generator=generator)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(7)) + torch.ones(width, width)
    return features @ mixing * torch.logspace(-2, 2, width), labels


# ---- kNN -----------------------------------------------------------------------------------------------------


def test_votes_follow_the_definition():
    queries, bank = torch.randn(7, 5), torch.randn(23, 5)
    labels = torch.randint(0, 4, (23,))
    expected = []
    for query in queries:  # written out: the k largest cosines, each voting with exp(cosine / T)
        cosines = torch.stack([query @ row / (query.norm() * row.norm()) for row in bank])
        votes = [0.0] * 4
        for place in cosines.argsort(descending=True)[:6].tolist():
            votes[int(labels[place])] += float(torch.exp(cosines[place] / 0.1))
        expected.append(votes.index(max(votes)))
    for chunk in (2, 512):
        found = knn_predict(queries, bank, labels, 4, k=6, temperature=0.1, query_chunk=chunk)
        assert found.tolist() == expected
    assert len(set(expected)) > 1


def test_nearest_in_chunks_of_the_bank_is_nearest_at_once():
    queries, bank = torch.randn(5, 6), torch.randn(40, 6)
    values, rows = nearest(queries, bank, 9)
    for chunk in (4, 7, 39):
        again = nearest(queries, bank, 9, chunk=chunk)
        torch.testing.assert_close(again[0], values)
        assert torch.equal(again[1], rows)
    assert nearest(queries, bank[:3], 9)[0].shape == (5, 3)


def test_a_low_temperature_is_the_nearest_neighbour_and_stays_finite():
    queries, bank = torch.randn(20, 4), torch.randn(50, 4)
    labels = torch.randint(0, 5, (50,))
    nearest_one = knn_predict(queries, bank, labels, 5, k=1)
    assert torch.equal(knn_predict(queries, bank, labels, 5, k=50, temperature=1e-4), nearest_one)


# ---- the linear probe -----------------------------------------------------------------------------------------


def loss_by_autograd(features, labels, fit, penalty):
    """The objective as written down, at a fit, with its gradients by autograd: zero at the minimum, which is unique."""
    weight, bias = (value.double().requires_grad_(True) for value in (fit.weight, fit.bias))
    loss = F.cross_entropy(features @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
    loss.backward()
    return loss, weight.grad, bias.grad


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_the_fit_is_the_minimum_of_the_penalised_loss(penalty):
    features, labels = clusters(300, noise=4.0)  # not separable: the minimum is no matter of the penalty alone
    axes = principal_axes(features)
    rotated = axes.apply(features)
    fit = fit_linear(rotated, labels, 3, penalty, axes.variances)
    assert fit.converged and fit.gradient <= 1e-4 and fit.iterations < 100
    standard = (features - features.mean(0)) / features.std(0, unbiased=False)
    in_features = fit._replace(weight=fit.weight @ axes.vectors.T)  # the same classifier on standardised features
    loss, of_weight, of_bias = loss_by_autograd(standard.double(), labels, in_features, penalty)
    assert loss.item() == pytest.approx(fit.loss, rel=1e-4)
    assert of_weight.abs().max() < 5e-4 and of_bias.abs().max() < 5e-4
    again = fit_linear(rotated, labels, 3, penalty, axes.variances, start=fit)
    assert again.iterations <= 5 and again.loss == pytest.approx(fit.loss, rel=1e-4)


def newton(features, labels, classes, penalty):
    """The same minimum by Newton's method on all weights at once, in double, on standardised features."""
    x = features.double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    decayed = torch.ones(classes, x.shape[1]).double() * penalty
    decayed[:, -1] = 0

    def loss(flat):
        weight = flat.view(classes, -1)
        return F.cross_entropy(x @ weight.T, labels) + (decayed * weight.square()).sum() / 2

    flat = torch.zeros(classes * x.shape[1], dtype=torch.float64)
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(loss, flat)
        hessian = torch.autograd.functional.hessian(loss, flat)
        flat = flat - torch.linalg.pinv(hessian) @ gradient  # the biases may all shift: one direction is flat
    return loss(flat).item(), (x @ flat.view(classes, -1).T).softmax(1)


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
def test_the_fit_is_that_of_newtons_method(penalty):
    features, labels = clusters(60, width=5)
    axes = principal_axes(features)
    rotated = axes.apply(features)
    fit = fit_linear(rotated, labels, 3, penalty, axes.variances, tolerance=1e-7)
    loss, chances = newton(features, labels, 3, penalty)
    assert fit.loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close((rotated @ fit.weight.T + fit.bias).softmax(1), chances.float(), atol=1e-4, rtol=1e-3)


def test_scale_shift_and_rotation_of_the_features():
    """Standardised features: scaling and shifting single ones changes nothing, nor does one that never varies."""
    features, labels = clusters(200, noise=3.0)
    other = torch.cat([features * torch.logspace(2, -2, 8) - 5, torch.full((200, 2), 3.0)], dim=1)
    fits = []
    for rows in (features, other):
        axes = principal_axes(rows)
        fits.append(fit_linear(axes.apply(rows), labels, 3, 1e-2, axes.variances))
        assert len(axes.variances) <= 8
    assert fits[0].loss == pytest.approx(fits[1].loss, rel=1e-4)


@pytest.mark.parametrize("rows", [12, 40])
def test_axes_are_orthonormal_and_carry_the_variance(rows):
    """With fewer rows than dimensions too, where another matrix is decomposed."""
    features = clusters(rows, width=24)[0]
    axes = principal_axes(features)
    kept = len(axes.variances)
    assert kept == min(rows - 1, 24)
    torch.testing.assert_close(axes.vectors.T @ axes.vectors, torch.eye(kept), atol=1e-3, rtol=0)
    rotated = axes.apply(features)
    torch.testing.assert_close(rotated.T @ rotated / rows, axes.variances.diag(), atol=1e-3, rtol=1e-3)
    assert axes.variances.sum().item() == pytest.approx(24, rel=1e-3)  # of standardised features


def test_constant_features_leave_the_frequencies():
    labels = torch.tensor([0] * 30 + [1] * 10)
    axes = principal_axes(torch.full((40, 4), 2.0))
    fit = fit_linear(axes.apply(torch.full((40, 4), 2.0)), labels, 2, 1e-3, axes.variances)
    assert fit.weight.shape == (2, 0)
    assert fit.bias.softmax(0)[0].item() == pytest.approx(0.75, abs=1e-3)


class Given:
    """What the evaluators ask of `LabelledImages`, around features that are given."""

    def __init__(self, train: Labelled, test: Labelled, classes: int) -> None:
        self.parts, self.classes, self.test = (train, test), classes, list(test.rows)
        self.class_names, self.train_labels = [str(index) for index in range(classes)], train.labels.tolist()

    def features(self, model: object, feature: str | None = None) -> tuple[Labelled, Labelled]:
        return self.parts

    def count(self) -> tuple[int, int]:
        return len(self.parts[0].rows), len(self.parts[1].rows)

    def train_rows(self) -> list[int]:
        return self.parts[0].rows

    def skipped(self, count: int) -> float:
        return 0.0

    refused: dict = {}


def given(train: tuple, test: tuple, classes: int) -> Given:
    return Given(*(Labelled(*part, list(range(len(part[1])))) for part in (train, test)), classes)


def test_the_evaluator_votes_as_the_function_does():
    """Its own k's and temperature, and cosines whatever the lengths of the features."""
    train, test = clusters(90, classes=4, noise=6.0), clusters(60, classes=4, noise=6.0, seed=1)
    lengths = torch.logspace(-2, 2, 90)[torch.randperm(90, generator=torch.Generator().manual_seed(3))]
    train = (train[0] * lengths[:, None], train[1])
    evaluator = KnnAccuracy("knn", given(train, test, 4), k=[7, 40], temperature=0.02, query_chunk=11)
    found, settings = evaluator(None), {"temperature": 0.02}
    for name, k in (("accuracy", 7), ("accuracy_k40", 40)):
        right = (knn_predict(test[0], *train, 4, k=k, **settings) == test[1]).float().mean().item()
        assert found[name] == pytest.approx(right)
    other = (knn_predict(test[0], *train, 4, k=40, temperature=1.0) == test[1]).float().mean().item()
    assert other != pytest.approx(found["accuracy_k40"])  # the temperature counts


def test_the_probe_is_fitted_to_all_training_rows_and_standardised_by_them_alone():
    """The test rows are shifted and stretched: by their own mean and deviation they would be judged otherwise."""
    train, test = clusters(120, noise=6.0), clusters(90, noise=6.0, seed=1)
    test = (test[0] * 1.5 + 2.0, test[1])
    probe = LinearProbe("probe", given(train, test, 3), regularisation=(1e-3, 1e-1, 10.0), validation=0.3)
    result = probe.examine(None)
    metrics = result.metrics
    accuracies = [row["accuracy"] for row in result.tables["sweep"]]
    assert metrics["validation_accuracy"] == max(accuracies) > min(accuracies)
    assert metrics["regularisation"] == (10.0, 1e-1, 1e-3)[accuracies.index(max(accuracies))]
    mean, deviation = train[0].double().mean(0), train[0].double().std(0, unbiased=False)
    rows, others = ((part.double() - mean) / deviation for part in (train[0], test[0]))
    weight, bias = torch.zeros(3, 8, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _ in range(3000):  # plain gradient descent
        off = (rows @ weight.T + bias).softmax(1) - F.one_hot(train[1], 3)
        weight -= 0.1 * (off.T @ rows / 120 + metrics["regularisation"] * weight)
        bias -= 0.1 * off.mean(0)
    for figure, features, labels in (("train_accuracy", rows, train[1]), ("accuracy", others, test[1])):
        right = ((features @ weight.T + bias).argmax(1) == labels).double().mean().item()
        assert metrics[figure] == pytest.approx(right)


def test_the_rows_that_choose_the_penalty_are_not_learnt_from():
    """Labels at random and more dimensions than rows: what was learnt is right always, the rest at chance."""
    features, labels = torch.randn(80, 120), torch.randint(0, 2, (80,))
    probe = LinearProbe("probe", given((features, labels), (features, labels), 2), regularisation=(1e-3, 1e-2, 1e-1),
                        validation=0.5)  # fmt: skip
    metrics = probe(None)
    assert metrics["train_accuracy"] == 1.0 and metrics["validation_accuracy"] < 0.8


# ---- the evaluators -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    return VisionEncoder.from_backbone(tiny.tiny_vit(), tiny.tiny_image_processor("vit"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return load_records(str(tiny.write_pairs_parquet(tmp_path_factory.mktemp("d") / "pairs.parquet", n=96)))


def test_both_on_images_that_can_be_told_apart(encoder, rows):
    train, test = rows.select(range(64)), rows.select(range(64, 96))
    data = LabelledImages(train, test, batch_size=20)
    knn = KnnAccuracy("knn", data, k=[3, 5], raw_pixels=True)
    probe = LinearProbe("probe", data, regularisation=(1e-3, 1e-1), validation=0.25, raw_pixels=True)
    result = knn.examine(encoder)
    metrics = result.metrics
    assert metrics["accuracy"] > 0.25 and metrics["count"] == 32 and "accuracy_k5" in metrics
    assert result.baselines["chance"]["accuracy"] == pytest.approx(1 / 16)
    assert result.baselines["raw_pixels"]["accuracy"] > 0.8
    result = probe.examine(encoder)
    found = result.metrics
    assert found["accuracy"] > 0.25 and found["converged"] == 1.0 and found["regularisation"] in (1e-3, 1e-1)
    assert [row["name"] for row in result.tables["sweep"]] == ["0.1", "0.001"]
    assert result.baselines["raw_pixels"]["accuracy"] > 0.8
    # the features are the encoder's own vectors, of all rows in their order
    own = encoder.encode([row["image"] for row in test], feature="pooled")
    torch.testing.assert_close(data.features(encoder)[1].features, own, atol=2e-2, rtol=1e-2)


def test_the_encoder_sees_whole_images_as_its_processor_gives_them(encoder):
    """No random crop, no flip: to a grey level, also of the images that were kept."""
    records = [{"image": tiny.random_image(place, 45), "label": place % 2} for place in range(6)]
    data, processor = LabelledImages(records, records, feature="pixels", batch_size=4), encoder.processor
    expected = processor([row["image"] for row in records], return_tensors="pt")["pixel_values"].flatten(1)
    for _ in range(2):
        off = (data.features(encoder)[0].features - expected).abs().max()
        assert off <= 1.01 / 255 / min(processor.image_std)
        data.forget()


def test_features_are_computed_once_a_weight_and_modes_come_back(rows, monkeypatch):
    encoder = VisionEncoder.from_backbone(tiny.tiny_vit(seed=3), tiny.tiny_image_processor("vit"))
    encoder.train()
    data = LabelledImages(rows, rows)
    calls = []
    monkeypatch.setattr(encoder, "forward", lambda *a, _f=encoder.forward, **k: calls.append(1) or _f(*a, **k))
    KnnAccuracy("a", data, k=1)(encoder, 0)
    once = len(calls)
    state = torch.random.get_rng_state()
    LinearProbe("b", data, regularisation=0.1)(encoder, 0)
    assert len(calls) == once and encoder.training
    assert torch.equal(state, torch.random.get_rng_state())
    with torch.no_grad():
        next(encoder.parameters()).add_(0.1)
    KnnAccuracy("a", data, k=1)(encoder, 1)
    assert len(calls) == 2 * once


def test_a_network_in_training_is_left_as_it_is(rows):
    """BatchNorm's running statistics included, which a pass in training mode would move."""
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}
    encoder = VisionEncoder.from_backbone(*build_backbone("resnet", image_size=32, **sizes)).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    data = LabelledImages(rows, rows)
    LinearProbe("p", data, regularisation=0.1)(encoder, 0)
    first = KnnAccuracy("k", data, k=3)(encoder, 0)
    assert first == KnnAccuracy("k", LabelledImages(rows, rows, batch_size=7), k=3)(encoder, 0)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(module.training for module in encoder.modules())
    assert all(value.grad is None for value in encoder.parameters())


def test_limits_draw_at_random_and_bad_images_are_left_out(encoder, rows, caplog):
    broken = [dict(row) for row in rows.select(range(40))]
    broken[3]["image"] = b"no image"
    by_class = sorted(broken, key=lambda row: row["label"])
    data = LabelledImages(by_class, broken, train_limit=20)
    assert len({by_class[place]["label"] for place in data.train_rows()}) > 5  # the first 20 rows hold fewer
    with caplog.at_level(logging.WARNING):
        metrics = KnnAccuracy("knn", data, k=1)(encoder, 0)
    assert metrics["skipped"] == 1 and metrics["count"] == 39


def test_features_that_are_not_finite_are_told_and_left_out(rows, caplog, monkeypatch):
    """A NaN is nobody's neighbour; without this a broken encoder has the accuracy of a guess, and a probe converges."""
    encoder = VisionEncoder.from_backbone(tiny.tiny_vit(), tiny.tiny_image_processor("vit"))
    whole = KnnAccuracy("knn", LabelledImages(rows, rows), k=3)(encoder)
    forward = encoder.forward

    def broken(pixels, **settings):
        found = forward(pixels, **settings)
        found.pooled[1] = torch.nan
        return found

    monkeypatch.setattr(encoder, "forward", broken)
    with caplog.at_level(logging.WARNING):
        metrics = KnnAccuracy("knn", LabelledImages(rows, rows), k=3)(encoder)
        geometry = Geometry("board", rows, batch_size=96)(encoder)
    assert "1 images of the test set are left out: their features are not finite (the first is row 1)" in caplog.text
    assert (metrics["skipped"], metrics["count"], whole["count"]) == (1, 95, 96)
    assert geometry["count"] == 95 and geometry["effective_rank"] > 1
    monkeypatch.undo()
    with torch.no_grad():
        encoder.backbone.layernorm.weight.fill_(torch.nan)
    for evaluator in (KnnAccuracy("k", LabelledImages(rows, rows), k=3), LinearProbe("p", LabelledImages(rows, rows))):
        with pytest.raises(ValueError, match="no image of the training set has finite features"):
            evaluator(encoder)
    with pytest.raises(ValueError, match="none of the 96 images in column 'image' has finite features"):
        Geometry("board", rows)(encoder)


def test_only_what_is_asked_for_is_built(rows):
    """Twelve labelled images are too few for 20 neighbours, and enough for a probe."""
    data = [dict(row) for row in rows.select(range(12))]
    words = {"eval_dataset_name": "test", "evaluators": ["probe"], "final_evaluators": ["probe"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mllm_vision.data.load_records", lambda *a, **k: data)
        while_training, after = LabelledArguments(**words).build(data, {})
        assert [each.name for each in while_training] == [each.name for each in after] == ["probe"]
        with pytest.raises(ValueError, match="k=20 neighbours among 12"):
            LabelledArguments(**{**words, "final_evaluators": ["knn"]}).build(data, {})


def test_labels_as_words_numbers_and_classes(rows):
    names = rows.features["label"].names
    words = rows.remove_columns("label").rename_column("label_name", "label")
    data = LabelledImages(rows, words)
    assert data.class_names == names and data.test_labels == list(rows["label"])
    numbers = [{"image": row["image"], "label": row["label"] + 5} for row in rows]
    data = LabelledImages(numbers, numbers)
    assert data.class_names == [str(label + 5) for label in range(16)] and data.train_labels == list(rows["label"])


@torch.no_grad()
def test_training_rows_without_a_label_are_left_out(rows, encoder, caplog):
    """As if they were not there, and their number is told; also under a limit."""
    labels = [label if row % 5 else None for row, label in enumerate(rows["label"])]
    partly = [{"image": row["image"], "label": label} for row, label in zip(rows, labels, strict=True)]
    whole = [row for row in partly if row["label"] is not None]
    test = [{"image": row["image"], "label": row["label"]} for row in rows.select(range(24))]
    with caplog.at_level("INFO"):
        data = LabelledImages(partly, test)
    left_out = len(partly) - len(whole)
    assert f"{left_out} of {len(partly)} rows have no label (the first is row 0): the training set is" in caplog.text
    assert len(data.refused) == left_out and {why.reason for why in data.refused.values()} == {"the row has no label"}
    for evaluator in (KnnAccuracy, partial(LinearProbe, regularisation=1e-3)):
        found, wanted = (evaluator("it", each)(encoder) for each in (data, LabelledImages(whole, test)))
        assert found["accuracy"] == wanted["accuracy"] and found["count"] == wanted["count"] == 24
    words = [row | {"label": "" if row["label"] is None else f"class {row['label']}"} for row in partly]
    assert LabelledImages(words, [row for row in words if row["label"]]).class_names[0] == "class 0"
    limited = LabelledImages(partly, test, train_limit=20)
    assert limited.count() == (20, 24) and all(labels[row] is not None for row in limited.train_rows())


def test_labels_that_will_not_do(rows, encoder):
    images = [{"image": row["image"]} for row in rows]
    with pytest.raises(ValueError, match="need labelled images; the test set: no column found for label"):
        LabelledImages(rows, images)
    hidden = rows.remove_columns("label").add_column("label", [-1] * 4 + list(rows["label"])[4:])
    shown = rows.cast_column("label", Value("int64"))
    left = KnnAccuracy("knn", LabelledImages(shown, hidden), k=3).examine(encoder)  # as in training, and told
    assert (left.metrics["count"], left.metrics["skipped"]) == (92, 4) and left.refused == {"the row has no label": 4}
    nothing = rows.remove_columns("label").add_column("label", [-1] * len(rows))
    with pytest.raises(ValueError, match="none of the 96 rows of the training set has a label"):
        LabelledImages(nothing, rows)
    other = rows.cast_column("label", ClassLabel(names=[f"new {i}" for i in range(16)]))
    with pytest.raises(ValueError, match="labels that the training set lacks: .'new 0'"):
        LabelledImages(rows, other)
    one = Dataset.from_dict({"image": [row["image"] for row in rows.select(range(4))], "label": ["a"] * 4})
    with pytest.raises(ValueError, match="1 class"):
        LabelledImages(one, one)
    data = LabelledImages(rows, rows, train_limit=12)
    for wrong, message in (
        (lambda: KnnAccuracy("k", data, k=20), "k=20 neighbours among 12 training images; use 1 to 12"),
        (lambda: KnnAccuracy("k", data, k=1, temperature=0.0), "temperature=0.0 must be positive"),
        (lambda: LinearProbe("p", data, regularisation=[0.0]), "must be one positive number or more"),
        (lambda: LinearProbe("p", data, validation=1.5), "validation=1.5 must lie in"),
        (lambda: LinearProbe("p", data, validation=0.01), "holds out 0"),
        (lambda: LabelledImages(rows, rows, feature="cls"), "feature='cls' is none of"),
        (lambda: LabelledImages(rows, rows, train_limit=0), "train_limit=0 leaves no images"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_convergence_is_told(rows, encoder, caplog):
    data = LabelledImages(rows, rows)
    probe = LinearProbe("p", data, regularisation=(1e-5, 1e-6, 1e-7), max_iterations=5, tolerance=1e-9)
    with caplog.at_level(logging.WARNING):
        assert probe(encoder, 0)["converged"] == 0.0
    assert "stopped after 5 iterations" in caplog.text and "at an end of the sweep" in caplog.text
