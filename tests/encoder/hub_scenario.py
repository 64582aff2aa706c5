"""What tests/encoder/test_hub.py runs in a fresh process: a Hub of our own in a thread, and every way to use it.

The client reads its environment when it is imported, hence the process of its own. Prints one JSON object.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

from hub_server import READER, HubServer  # noqa: E402

out: dict[str, object] = {}


def refused(action) -> dict[str, str]:
    try:
        action()
    except Exception as error:
        return {"kind": type(error).__name__, "message": str(error), "cause": type(error.__cause__).__name__}
    return {"kind": "nothing was raised", "message": ""}


def main(folder: Path, hub: HubServer) -> None:
    import push_to_hub
    import tiny
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    from mllm_vision.encoder import DualEncoder, VisionEncoder
    from mllm_vision.hub.lineage import hash_weights, write_lineage

    image = tiny.random_image(3, (40, 56))

    # A run folder as the recipes leave it.
    home = folder / "run" / "encoder"
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(seed=1), tiny.tiny_image_processor("clip"))
    encoder.save_pretrained(home)
    sha = hash_weights(home)
    write_lineage(home, json.loads(LINEAGE) | {"weights_sha256": sha})
    (home / "recipe.yaml").write_text("learning_rate: 0.001\nobjective: clip\nseed: 42\nlogging_steps: 10\n")
    run = {"artifacts": [{"name": "encoder", "weights_sha256": sha}], "seconds": 90.0, "kind": "stage_zero"}
    run["history"] = [{"step": 10, "loss": 2.0, "eval_r": 0.1}, {"step": 20, "loss": 1.5, "eval_r": 0.4}]
    (folder / "run" / "run.json").write_text(json.dumps(run))

    loaded = VisionEncoder.from_pretrained(home)
    tokens = loaded.encode([image])
    out["address"] = loaded.push_to_hub("us/first", private=True)
    first = hub.repositories["us/first"]
    loaded.save_pretrained(folder / "again")
    written = {path.name: path.read_bytes() for path in (folder / "again").iterdir()}
    remote = dict(first.files("main"))
    out["remote"] = sorted(remote)
    out["card"] = remote.pop("README.md").decode()
    remote.pop(".gitattributes")
    out["exactly"] = remote == written
    out["private"] = first.private
    back = VisionEncoder.from_pretrained("us/first")
    out["same_tokens"] = bool(torch.equal(back.encode([image]), tokens))
    out["lineage_back"] = back.lineage["weights_sha256"] == sha

    # The ten lines of use on the card, as they stand.
    for block in out["card"].split("```python\n")[1:]:
        scope = locals().get("scope") or {}
        exec(compile(block.split("```")[0], "<card>", "exec"), scope)
    out["card_tokens"] = list(scope["tokens"].shape)

    # A branch of its own: main stays.
    before = first.branches["main"]
    other = VisionEncoder.from_backbone(
        tiny.tiny_clip_vision(seed=2), tiny.tiny_image_processor("clip"), select_layer=-1, select_feature="cls_patch"
    )
    other.push_to_hub("us/first", revision="second", commit_message="another one")
    out["main_stays"] = first.branches["main"] == before
    out["message"] = first.messages[-1]
    second = VisionEncoder.from_pretrained("us/first", revision="second")
    out["second_same"] = bool(torch.equal(second.encode([image]), other.encode([image])))
    out["second_selection"] = [second.select_layer, second.select_feature]
    out["second_lineage_gone"] = "lineage.json" not in first.files("second")
    out["no_revision"] = refused(lambda: VisionEncoder.from_pretrained("us/first", revision="third"))
    out["no_repository"] = refused(lambda: VisionEncoder.from_pretrained("us/none"))
    out["no_access"] = refused(lambda: VisionEncoder.from_pretrained("us/first", token="hf_wrong"))
    out["no_access_without"] = refused(lambda: VisionEncoder.from_pretrained("us/first", token=False))

    # Refusals.
    out["wrong_token"] = refused(lambda: encoder.push_to_hub("us/stolen", token="hf_wrong"))
    out["reader"] = refused(lambda: encoder.push_to_hub("us/first", token=READER))
    out["bad_id"] = refused(lambda: encoder.push_to_hub("us/a/b"))
    out["stolen"] = "us/stolen" in hub.repositories

    # Uploads that break: nothing of them may be seen.
    state = (dict(first.branches), len(first.commits), dict(first.files("main")))
    waits, time.sleep = time.sleep, lambda seconds: None  # the client waits between its tries
    for step, status in (("put", 0), ("put", 500), ("batch", 500), ("verify", 400), ("commit", 500), ("commit", 0)):
        hub.fail = {step: status}
        out[f"broken_{step}_{status}"] = refused(
            lambda: VisionEncoder.from_backbone(
                tiny.tiny_clip_vision(seed=5), tiny.tiny_image_processor("clip")
            ).push_to_hub("us/first")
        )
        hub.blobs.pop(next(reversed(hub.blobs)), None) if step in ("verify", "commit") else None
    hub.fail = {}
    encoder.push_to_hub("us/fresh")  # not in this machine's cache yet: from there it would load all the same
    hub.fail = {"resolve": 503}
    out["broken_load"] = refused(lambda: VisionEncoder.from_pretrained("us/fresh"))
    hub.fail = {}
    time.sleep = waits
    out["untouched"] = state == (dict(first.branches), len(first.commits), dict(first.files("main")))
    out["loads_after"] = bool(torch.equal(VisionEncoder.from_pretrained("us/first").encode([image]), tokens))

    # Trained on: the lineage no longer speaks of these weights, and must go from the Hub too.
    with torch.no_grad():
        loaded.backbone.post_layernorm.weight.add_(1)
    loaded.push_to_hub("us/first")
    out["stale_lineage"] = "lineage.json" in first.files("main")
    out["trained_on"] = VisionEncoder.from_pretrained("us/first").lineage is None

    # The script, for an image-text pair and a vision-language model.
    pair = folder / "pair"
    tiny.tiny_clip(vision={"mllm_vision": {"select_layer": -1}}).save_pretrained(pair)
    tiny.tiny_image_processor("clip").save_pretrained(pair)
    vlm = folder / "vlm"
    tokenizer = tiny.tiny_tokenizer(folder / "tokenizer")
    text = tiny.tiny_llama(len(tokenizer)).config
    llava = LlavaConfig(vision_config=tiny.tiny_clip_vision().config, text_config=text, image_token_index=4)
    model = LlavaForConditionalGeneration(llava)
    model.save_pretrained(vlm)
    LlavaProcessor(
        image_processor=tiny.tiny_image_processor("clip"),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(vlm)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        push_to_hub.main(["--model", str(pair), "--repo_id", "us/pair"])
        push_to_hub.main(["--model", str(vlm), "--repo_id", "us/vlm", "--private"])
        push_to_hub.main(["--model", str(pair), "--repo_id", "us/x", "--dry_run"])
    out["script_said"] = said.getvalue()
    out["script_run_folder"] = refused(lambda: push_to_hub.main(["--model", str(home.parent), "--repo_id", "us/x"]))
    out["dry_run_made"] = "us/x" in hub.repositories
    out["vlm_files"] = sorted(hub.repositories["us/vlm"].files("main"))
    out["pair_card"] = hub.repositories["us/pair"].files("main")["README.md"].decode()
    out["vlm_card"] = hub.repositories["us/vlm"].files("main")["README.md"].decode()
    hub.calls.clear()
    tower = VisionEncoder.from_pretrained("us/vlm").backbone
    out["vlm_tower_same"] = all(
        torch.equal(tower.state_dict()[name], value) for name, value in model.model.vision_tower.state_dict().items()
    )
    out["vlm_calls"] = hub.calls.copy()
    out["pair_layer"] = VisionEncoder.from_pretrained("us/pair").select_layer
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(out["vlm_card"].split("```python\n")[1].split("```")[0], "<card>", "exec"), {})
    out["vlm_said"] = True

    checked_before_training(folder, hub)

    # A pair that no transformers class holds keeps its towers in folders.
    from transformers import BertConfig, BertModel

    own = folder / "own"
    words = tiny.tiny_tokenizer(folder / "words")
    words.model_max_length = 16
    bert = BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
        ),
        add_pooling_layer=False,
    )
    with contextlib.suppress(ImportError):
        DualEncoder(encoder, bert, words, pooling="mean").save_pretrained(own)
        push_to_hub.main(["--model", str(own), "--repo_id", "us/own"])
        out["own_same"] = bool(
            torch.equal(VisionEncoder.from_pretrained("us/own").encode([image]), encoder.encode([image]))
        )


def checked_before_training(folder: Path, hub: HubServer) -> None:
    """--push_to_hub of a run: what can be known is known before the training; what fails later can be made up for."""
    import huggingface_hub
    import push_to_hub
    import tiny

    from mllm_vision.training.recipe.arguments import RecipeArguments
    from mllm_vision.training.recipe.run import Run

    def begin(name: str, repo_id: str, token: str | None = None) -> Run:
        asked = {"push_to_hub": True, "hub_model_id": repo_id, "hub_token": token, "use_cpu": True}
        return Run("stage_zero", RecipeArguments(output_dir=str(folder / name), **asked), {}).start()

    out["check_wrong"] = refused(lambda: begin("a", "us/new", "hf_wrong"))
    out["check_reader"] = refused(lambda: begin("a", "us/first", READER))
    out["check_foreign"] = refused(lambda: begin("a", "them/new"))
    out["check_name"] = refused(lambda: begin("a", "us/a/b"))
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    out["check_offline"] = refused(lambda: begin("a", "us/new"))
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    hub.fail, waits = {"create": 500}, time.sleep
    time.sleep = lambda seconds: None
    out["check_down"] = refused(lambda: begin("a", "us/new"))
    hub.fail, time.sleep = {}, waits
    out["check_left"] = sorted(path.name for path in (folder / "a").iterdir())

    run = begin("b", "us/late")
    out["check_made"] = "us/late" in hub.repositories
    run.save_artifact(tiny.tiny_vit().save_pretrained, "encoder", "encoder")
    hub.fail = {"commit": 403}
    out["push_failed"] = refused(run.finish)
    hub.fail = {}
    (missing,) = json.loads((folder / "b" / "run.json").read_text())["missing"]
    out["push_missing"] = missing
    words = missing["remedy"].removeprefix("push it with: ").split()
    push_to_hub.main(words[words.index("scripts/push_to_hub.py") + 1 :])
    out["push_later"] = "model.safetensors" in hub.repositories["us/late"].files("main")


LINEAGE = json.dumps(
    {
        "schema": 1, "kind": "encoder", "stage": "stage_zero", "run": "trial", "seed": 42, "steps": 20, "seconds": 90.0,
        "machine": {"cpu": "two cores"}, "versions": {"torch": "2.13.0"}, "command": "python recipes/pretrain.py",
        "parents": [{"role": "tokenizer", "path": "runs/words", "weights_sha256": "abcdef0123456789ff"}],
        "data": {"train": {"rows": 1234, "fingerprint": "f00d", "columns": {"image": "image", "caption": "captions"},
                           "samples": [{"caption": "a red circle"}, {"caption": "a | b"}, {"caption": "c"}]}},
        "evaluations": {"scenes": {"accuracy": 0.95, "r1": 0.5, "primary_metric": "accuracy",
                                   "baselines": {"chance": 0.0625, "untrained": {"accuracy": 0.11, "r1": 0.01}}}},
        "verdict": "scenes accuracy 0.95: better than chance",
        "method": {"citation": "@article{somebody2026method,}"},
    }
)  # fmt: skip

if __name__ == "__main__":
    work = Path(sys.argv[1])
    with HubServer() as server:
        os.environ.update(server.environment(str(work / "home")))
        main(work, server)
    print("RESULT " + json.dumps(out))
