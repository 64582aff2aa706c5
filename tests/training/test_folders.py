"""Names, removal and whole folders in a run folder; what a killed process left is undone."""

from __future__ import annotations

from pathlib import Path

import pytest

from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.recipe.folders import check_name, clean, remove, whole_folder, write_whole
from mllm_vision.training.recipe.run import Run


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "../x", "a/b", "/tmp/x", "a\\b", ".hidden", "checkpoint-12", "run.json", "a\nb", "n" * 300],
)
def test_names_that_leave_the_run_or_meet_its_own_files_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--artifact_name .* cannot be used"):
        check_name(name, "--artifact_name")
    arguments = RecipeArguments(output_dir=str(tmp_path / "run"), use_cpu=True)
    with pytest.raises(ValueError, match="--artifact_name"):
        Run("stage_one", arguments, {"artifact_name": name}).start()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["model", "encoder-v2", "my model", "模型", "checkpoint-best"])
def test_plain_names_pass(name: str) -> None:
    assert check_name(name) == name


def test_nothing_outside_a_run_folder_is_removed_nor_through_a_link(tmp_path: Path) -> None:
    run, precious = tmp_path / "run", tmp_path / "precious"
    (precious / "inner").mkdir(parents=True)
    (precious / "file").write_text("kept")
    run.mkdir()
    (run / "model").symlink_to(precious)
    for path in (precious, run, run / "..", run / "model" / "inner", run / ".." / "precious"):
        with pytest.raises(ValueError, match="is not in the run folder"):
            remove(path, run)
    remove(run / "model", run)
    assert (precious / "file").read_text() == "kept" and (precious / "inner").is_dir()
    assert not (run / "model").is_symlink()


def test_an_artifact_that_is_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "old").touch()
    (tmp_path / "run").mkdir()
    final = tmp_path / "run" / "model"
    final.symlink_to(tmp_path / "elsewhere")
    with whole_folder(final) as partial:
        (partial / "new").touch()
    assert [path.name for path in final.iterdir()] == ["new"] and not final.is_symlink()
    assert (tmp_path / "elsewhere" / "old").is_file()
    assert [path.name for path in final.parent.iterdir()] == ["model"]


def test_a_folder_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "model"
    final.mkdir()
    (final / "old").touch()
    with pytest.raises(RuntimeError, match="broken"), whole_folder(final) as work:
        (work / "new").touch()
        assert (final / "old").exists()  # a reader still finds the old one
        raise RuntimeError("broken")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in final.iterdir()] == ["old"]


def test_what_a_kill_left_is_undone(tmp_path: Path) -> None:
    for name in (".model.previous", ".encoder.previous", "encoder", ".dual.partial", ".encoder.ab12.partial", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".run.json.partial").write_text("{")
    for name in (".checkpoint-6.partial", ".checkpoint-6.previous"):  # killed while one took the other's place
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(name)
    clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "encoder", "model", "notes"]
    assert (tmp_path / "model" / "file").read_text() == ".model.previous"  # restored: nothing replaced it
    assert (tmp_path / "encoder" / "file").read_text() == "encoder"
    assert (tmp_path / "checkpoint-6" / "trainer_state.json").read_text() == ".checkpoint-6.previous"


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "recipe.yaml"
    write_whole(file, "first")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mllm_vision.utils.to_disk", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, "second")
    assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]


def test_a_line_that_was_cut_off_is_not_joined_to_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    run = Run("stage_zero", RecipeArguments(output_dir=str(tmp_path), use_cpu=True, resume=True), {}).start()
    run.log(2, {"loss": 1.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n'
