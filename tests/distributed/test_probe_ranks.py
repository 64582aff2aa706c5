"""kNN and the linear probe over several ranks: the figures of one process."""

from __future__ import annotations

import probe_work as work
import pytest
import tiny


def test_ranks_agree_with_one_process(gloo, tmp_path):
    path = str(tiny.write_pairs_parquet(tmp_path / "pairs.parquet", n=60))
    expected = work.knn_and_probe(path)
    assert 0.1 < expected["knn"]["accuracy_k30"] < expected["knn"]["accuracy"]
    first, second = gloo.run(2, work.knn_and_probe, path)
    assert first == second
    assert first["knn"] == expected["knn"] and first["classes"] == expected["classes"]
    assert [row["accuracy"] for row in first["sweep"]] == [row["accuracy"] for row in expected["sweep"]]
    for probe in ("probe", "pixels"):
        for name in ("accuracy", "train_accuracy", "regularisation", "converged", "count"):
            assert first[probe][name] == pytest.approx(expected[probe][name])
