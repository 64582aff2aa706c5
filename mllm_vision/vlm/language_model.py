"""Joining a language model to a system: loading it, numerical checks that it fits, and its embeddings."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mllm_vision.errors import reading
from mllm_vision.vlm.tokens import load_tokenizer

logger = logging.getLogger(__name__)
OTHER = "use another --llm (Llama, Qwen, Mistral, Gemma 3, Phi-3, OLMo, GPT-2, ...)"
LOUD = {torch.float16: 1e3}  # logits this large (else 1e4) reveal caps and other nonlinearities


@dataclasses.dataclass
class JoinedLanguageModel:
    """A language model that fits a system, in parts.

    Attributes:
        model: the causal language model itself.
        base: its decoder without the head. head: its output layer.
        tied: whether input and output embeddings are one tensor.
        image_token_id: the token that stands for images.
        factor: of its logits, which is folded into the head.
    """

    model: PreTrainedModel
    base: Any
    head: Any
    tied: bool
    image_token_id: int
    factor: float = 1.0


def open_language_model(
    llm: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | str | Path | None,
    dtype: torch.dtype | str,
    **hub: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and its tokenizer.

    Raises:
        ValueError: a model without tokenizer, and what `load_language_model` raises.
        OSError: a path cannot be read.
    """
    if isinstance(llm, PreTrainedModel):
        model = llm
        if tokenizer is None:
            raise ValueError("llm is a model, which carries no tokenizer: pass tokenizer=, or the path of the model")
    else:
        source = str(llm)
        with reading(source):
            model = load_language_model(source, dtype, **hub)
            if tokenizer is None:
                tokenizer = load_tokenizer(source, **hub)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        with reading(tokenizer):
            tokenizer = load_tokenizer(str(tokenizer))
    return model, tokenizer


def join_language_model(
    language_model: PreTrainedModel, tokenizer: Any, image_token_id: int, *, softcap: bool = False
) -> JoinedLanguageModel:
    """Checks that the language model fits, grows its embeddings to the tokenizer, and settles ties and factors.

    Args:
        language_model: changed in place.
        tokenizer: with all tokens of the system.
        image_token_id: the id of the image token.
        softcap: the system applies `final_logit_softcapping` itself.

    Raises:
        ValueError: the language model does not fit (see `decoder_of` and `logit_factor`).
    """
    base = decoder_of(language_model)
    factor = logit_factor(language_model, base, softcap)
    warn_of_vocabulary(language_model, tokenizer)
    grow_embeddings(language_model, len(tokenizer))
    if factor != 1:
        fold_factor(language_model, factor)
    tied = _settle_tying(language_model, base)
    base.config.pad_token_id = tokenizer.pad_token_id
    return JoinedLanguageModel(
        language_model, base, language_model.get_output_embeddings(), tied, image_token_id, factor
    )


def warn_of_vocabulary(language_model: PreTrainedModel, tokenizer: Any) -> None:
    """A warning for a tokenizer with many more tokens than the language model has embeddings."""
    table: Any = language_model.get_input_embeddings().weight
    known = len(tokenizer) - len(getattr(tokenizer, "added_tokens_decoder", {}))
    if known > table.shape[0]:
        logger.warning(
            "the tokenizer has %d tokens, but %s has embeddings for only %d: is it the tokenizer of this model? The "
            "others are initialised to the mean",
            len(tokenizer),
            type(language_model).__name__,
            table.shape[0],
        )


@torch.no_grad()
def grow_embeddings(language_model: PreTrainedModel, size: int) -> int:
    """Grows the embeddings to ``size`` tokens; new input and output rows are the mean. Returns the rows added."""
    table: Any = language_model.get_input_embeddings().weight
    old = table.shape[0]
    if size <= old:
        return 0
    # transformers' mean_resizing samples around the mean, so equal runs would differ by the random state.
    language_model.resize_token_embeddings(size, mean_resizing=False)
    for layer in {language_model.get_input_embeddings(), language_model.get_output_embeddings()}:
        layer.weight[old:] = layer.weight[:old].mean(dim=0)
    logger.info("embeddings grown from %d to %d rows (new rows: the mean)", old, size)
    return size - old


def _settle_tying(language_model: PreTrainedModel, base: PreTrainedModel) -> bool:
    """Whether input and output embeddings stay tied, which transformers' systems support only for ``embed_tokens``.

    For other layouts (GPT-2's ``wte``) the output layer becomes a copy, so that the checkpoint stays loadable.
    """
    embeddings, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    tied = head.weight is embeddings.weight
    if tied and getattr(base, "embed_tokens", None) is not embeddings:
        head.weight = nn.Parameter(head.weight.detach().clone())
        tied = False
        logger.info("%s: output embeddings untied, as the system's class cannot tie them", type(base).__name__)
    for config in (language_model.config, base.config):
        config.tie_word_embeddings = tied
    return tied


def load_language_model(source: str, dtype: torch.dtype | str, **hub: Any) -> PreTrainedModel:
    """The causal language model at ``source`` (folder or Hub id), complete.

    Raises:
        ValueError: no config, only adapters, quantised weights, an encoder-decoder, a vision-language model, or missing
            weights.
        OSError: ``source`` cannot be read.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"llm={source} contains LoRA adapters without their model: merge them (peft's merge_and_unload), save "
                "the result and use that folder"
            )
        raise ValueError(f"llm={source} has no config.json, so it is not a language model; use the folder with one")
    _check_config(source, AutoConfig.from_pretrained(source, **hub))
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, output_loading_info=True, use_safetensors=True, **hub
    )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"llm={source} lacks {len(missing)} weights of a {type(model).__name__} ({', '.join(missing[:3])}), which "
            "would be random; use a checkpoint saved with its output layer (AutoModelForCausalLM)"
        )
    return model


def _check_config(source: str, config: Any) -> None:
    kind = config.model_type
    if getattr(config, "quantization_config", None):
        method = getattr(config.quantization_config, "get", lambda *_: None)("quant_method") or "quantised"
        raise ValueError(
            f"llm={source} is quantised ({method}), and its weights cannot be saved as part of a LLaVA; use the "
            "unquantised model"
        )
    if getattr(config, "is_encoder_decoder", False) or "t5" in kind:
        raise ValueError(f"llm={source} is an encoder-decoder ({kind}), but LLaVA's layout holds a decoder; {OTHER}")
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and hasattr(config, "vision_config"):
        raise ValueError(
            f"llm={source} is a vision-language model already ({kind}): train a LLaVA further with "
            f"recipes/instruct.py --model, or {OTHER}"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"llm={source} contains a {kind} model, which is not a causal language model; {OTHER}")


def decoder_of(language_model: PreTrainedModel) -> PreTrainedModel:
    """The language model without its head.

    Raises:
        ValueError: LLaVA's layout cannot hold the head, or cannot load or run the decoder.
    """
    name = type(language_model).__name__
    head = language_model.get_output_embeddings()
    base: Any = language_model.base_model
    if base is language_model:  # an invalid base_model_prefix (Llama 4)
        base = next((child for child in language_model.children() if isinstance(child, PreTrainedModel)), None)
    if head is None or base is None:
        raise ValueError(f"{name} is not a causal language model with a separate head; {OTHER}")
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"{name} has an output layer with a bias, which LLaVA's layout cannot hold; {OTHER}")
    width = getattr(base.config, "hidden_size", None)
    if width != head.in_features:
        raise ValueError(
            f"{name} projects its hidden states ({width} wide) to {head.in_features} before the output layer, "
            f"which LLaVA's layout cannot hold; {OTHER}"
        )
    alone = MODEL_MAPPING.get(type(base.config), None)
    if type(base) not in (alone if isinstance(alone, tuple) else (alone,)):
        raise ValueError(
            f"{name} is built on a {type(base).__name__}, which transformers does not load by itself (AutoModel gives "
            f"{getattr(alone, '__name__', 'nothing')}), so a LLaVA could not be loaded again; {OTHER}"
        )
    takes = inspect.signature(base.forward).parameters
    if "past_key_values" not in takes or "inputs_embeds" not in takes:
        raise ValueError(
            f"{name} has no key-value attention (its forward takes no past_key_values), which LLaVA's generation "
            f"needs; {OTHER}"
        )
    return base


class _Amplified:
    """Multiplies the head's outputs by a factor, within the model's forward."""

    def __init__(self, head: nn.Module, factor: float) -> None:
        self.factor, self.calls = factor, 0
        self._hook = head.register_forward_hook(self._multiply)

    def _multiply(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        self.calls += 1
        return output * self.factor

    def __enter__(self) -> _Amplified:
        return self

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()


def _sample_ids(language_model: PreTrainedModel, length: int = 12) -> Tensor:
    """``[1, length]`` ordinary tokens, deterministic."""
    config = language_model.config
    table: Any = language_model.get_input_embeddings().weight
    avoid = {getattr(config, f"{role}_token_id", None) for role in ("pad", "bos", "eos")}
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(table), (16 * length,), generator=generator).tolist()
    usable = [token for token in drawn if token not in avoid] or drawn
    return torch.tensor([(usable * length)[:length]], device=table.device)


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2


@torch.no_grad()
def logit_factor(language_model: PreTrainedModel, base: PreTrainedModel, softcap: bool = False) -> float:
    """The factor between the model's own logits and ``head(base(embeddings))``, which is all that LLaVA computes.

    1.0 for most; Granite and Cohere scale their logits. The comparison is the model's own forward on token ids
    against the decoder on their embeddings, with logits made large, so that caps show in untrained models as well.
    With ``softcap`` the cap of the config is part of what the system computes.

    Raises:
        ValueError: the logits differ by more than a factor, or a token sees later ones.
    """
    name = type(language_model).__name__
    language_model.eval()
    ids, head = _sample_ids(language_model), language_model.get_output_embeddings()
    embeds = language_model.get_input_embeddings()(ids).repeat(2, 1, 1)
    embeds[1, -1] *= -50  # the second row differs in what comes last
    try:
        hidden = base(inputs_embeds=embeds, use_cache=False).last_hidden_state
    except (TypeError, AttributeError, NotImplementedError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} cannot start from embeddings, as LLaVA does ({_line(error)}); {OTHER}") from error
    tolerance = _tolerance(hidden.dtype)
    scale = hidden[:1].abs().max()
    if (hidden[0, :-1] - hidden[1, :-1]).abs().max() > 0.1 * tolerance * scale:
        raise ValueError(
            f"{name} lets a token see the ones after it (is_decoder={getattr(base.config, 'is_decoder', None)}), so it "
            f"is not a causal language model; {OTHER}"
        )
    joined = head(hidden[:1])
    largest = float(joined.abs().max())
    if not math.isfinite(largest) or largest == 0.0:
        return 1.0
    with _Amplified(head, 2.0 ** max(0, math.ceil(math.log2(LOUD.get(joined.dtype, 1e4) / largest)))) as amplified:
        own = language_model(input_ids=ids, use_cache=False).logits.double()
    joined = joined.double() * (amplified.factor if amplified.calls else 1.0)
    cap = getattr(base.config, "final_logit_softcapping", None) if softcap else None
    if cap:
        joined = cap * torch.tanh(joined / cap)
    own = own[..., : joined.shape[-1]]
    factor = float((own * joined).sum() / joined.square().sum())
    if own.shape != joined.shape or not (own - factor * joined).abs().max() <= tolerance * own.abs().max():
        raise ValueError(f"{_why(language_model, base, ids, hidden[:1])}; {OTHER}")
    return 1.0 if abs(factor - 1) < 0.2 * tolerance else _named_factor(language_model.config, factor, tolerance)


def _why(language_model: PreTrainedModel, base: PreTrainedModel, ids: Tensor, hidden: Tensor) -> str:
    """Why the logits differ from the model's own."""
    name, config = type(language_model).__name__, language_model.config
    other = base(input_ids=ids, use_cache=False).last_hidden_state
    if (other - hidden).abs().max() > _tolerance(hidden.dtype) * hidden.abs().max():
        return f"{name} computes something else from embeddings than from token ids, but LLaVA gives it embeddings"
    fields = [
        f"{field}={value}"
        for field, value in config.to_dict().items()
        if ("softcap" in field or "logit" in field) and isinstance(value, int | float) and "attn" not in field
    ]
    said = f" ({', '.join(fields)})" if fields else ""
    return f"{name} bends its logits after the output layer{said}, which LLaVA's layout has no place for"


def _named_factor(config: Any, factor: float, tolerance: float) -> float:
    """The number of the config closest to ``factor`` or its inverse, which is free of rounding."""
    values = [float(value) for value in config.to_dict().values() if isinstance(value, int | float) and value]
    exact = [number for value in values for number in (value, 1 / value) if abs(number / factor - 1) < 0.1 * tolerance]
    return min(exact, key=lambda number: abs(number / factor - 1), default=factor)


def fold_factor(language_model: PreTrainedModel, factor: float) -> None:
    """Multiplies the output layer by ``factor``, and unties it from the embeddings."""
    head, embeddings = language_model.get_output_embeddings(), language_model.get_input_embeddings()
    name, tied = type(language_model).__name__, head.weight is embeddings.weight
    with torch.no_grad():
        head.weight = nn.Parameter(head.weight.detach() * factor, requires_grad=head.weight.requires_grad)
    logger.info(
        "%s multiplies its logits by %g: folded into the output layer%s",
        name,
        factor,
        ", which is no longer tied to the embeddings" if tied else "",
    )


@torch.no_grad()
def check_generation(task: Any, name: str) -> None:
    """Compares the logits of three tokens that a `LanguageTask` generates (with cache) with those of one forward pass.

    Raises:
        ValueError: it does not generate, or the two differ.
    """
    model = task.model
    ids = _sample_ids(model)
    few = GenerationConfig(max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
    few.pad_token_id = model.generation_config.pad_token_id
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        said = task.generate(ids, generation_config=few)
        labels = said.sequences.clone()
        labels[:, : ids.shape[1]] = -100
        whole = task(said.sequences, labels, return_logits=True).logits[None]
    except Exception as error:
        raise ValueError(f"{name} does not generate inside {task.system.name} ({_line(error)}); {OTHER}") from error
    finally:
        model.generation_config = kept
    steps = torch.stack(said.logits, dim=1).to(whole)
    if not (steps - whole).abs().max() <= _tolerance(whole.dtype) * whole.abs().max():
        raise ValueError(f"{name} computes other logits with its cache than without inside {task.system.name}; {OTHER}")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
