"""Make a model ready to be trained: load it, add the adapter, switch dropout off."""

import logging
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.integrations import apply_liger_kernel, is_deepspeed_zero3_enabled
from transformers.utils.peft_utils import find_adapter_config_file
from trl.trainer import disable_dropout_in_model

from polypo import recipes

from .head import head_rows
from .router import router_loss

logger = logging.getLogger(__name__)

# Keywords of every `from_pretrained`: nothing that is read may run code. A run may say otherwise in its
# `model_init_kwargs`. DeepSpeed opens its own shards without protection: trust such a checkpoint like a program.
SAFE = {"use_safetensors": True, "trust_remote_code": False}
PLAIN_RATES = ("attention_dropout", "dropout")  # dropout rates that attention modules keep as plain numbers


def load_policy(
    model: str | PreTrainedModel | PeftModel, *, init_kwargs: dict[str, Any] | None = None, quantization_config=None
) -> PreTrainedModel | PeftModel:
    """A model given as a path or hub id is loaded; one given as an instance is taken as it is.

    Only safetensors are read, and no code from the model's folder runs, unless `init_kwargs` say otherwise.

    Raises:
        ValueError: loading options were given for a model that is already loaded, or weights are missing, which
            `from_pretrained` alone would draw at random.
    """
    if not isinstance(model, str):
        for name, value in (("model_init_kwargs", init_kwargs), ("quantization_config", quantization_config)):
            if value:
                raise ValueError(f"{name} has no effect on a model that is already loaded: pass the model as a path.")
        return model
    kwargs = {**SAFE, **(init_kwargs or {})}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    answer: Any = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True, **kwargs)
    loaded, info = answer
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"The weights of {model} lack {len(missing)} of the model's, such as {missing[0]}: they would be random."
        )
    return loaded


def add_adapter(model: PreTrainedModel, peft_config: PeftConfig, *, zero3: bool) -> PeftModel:
    """Wrap a model in a fresh adapter.

    Raises:
        ValueError: the model has an adapter already, which would go on beside the new one.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            "The model is a PeftModel already: omit peft_config to go on training its adapter, or merge it."
        )
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    # ZeRO-3 gathers parameters in one dtype (DeepSpeed issue 8072): float32 adapters on a bf16 base would fail.
    return get_peft_model(model, peft_config, autocast_adapter_dtype=not zero3 or quantized)


def is_adapter(path: str, revision: str | None = None) -> bool:
    """Whether a path or hub id holds an adapter, and not a whole model."""
    return find_adapter_config_file(path, revision=revision or "main") is not None


def find_adapter(path: str, revision: str | None = None) -> PeftConfig | None:
    """The config of the adapter at a path or hub id; None where there is none.

    Raises:
        ValueError: the adapter names no base to load it on, or the folder holds adapters in folders of their names.
    """
    if not is_adapter(path, revision):
        recipes.refuse_named_adapters(path)
        return None
    config = PeftConfig.from_pretrained(path, revision=revision or "main")
    if not config.base_model_name_or_path:
        raise ValueError(
            f"model_name_or_path: {path} is an adapter whose adapter_config.json names no base: write the path or hub "
            "id of its base there as base_model_name_or_path. In Python, PeftModel.from_pretrained(base, "
            f"{path!r}, is_trainable=True) can be the model."
        )
    return config


def load_adapter(path: str, *, init_kwargs: dict[str, Any] | None, quantization_config=None) -> PeftModel | None:
    """The trainable adapter at a path or hub id on the base that it names; None where there is no adapter."""
    kwargs = {**SAFE, **(init_kwargs or {})}
    revision = kwargs.get("revision") or "main"
    config = find_adapter(path, revision)
    if config is None:
        return None
    kwargs["revision"] = config.revision or "main"  # the other one was that of the adapter
    name = config.base_model_name_or_path
    assert name is not None  # `find_adapter` refuses it
    base = load_policy(name, init_kwargs=kwargs, quantization_config=quantization_config)
    return PeftModel.from_pretrained(base, path, is_trainable=True, revision=revision)


def prepare_policy(model, args, quantization_config, peft_config: PeftConfig | None) -> PreTrainedModel | PeftModel:
    """The policy with its adapter and without dropout, as the trainer's `args` want it; see `load_policy`.

    A path to an adapter gives that adapter on its base, trainable, as a PeftModel does.

    Raises:
        ValueError: the adapter puts virtual tokens before each row, or the loss of a router would have no gradient.
    """
    options = {"init_kwargs": args.model_init_kwargs, "quantization_config": quantization_config}
    model = isinstance(model, str) and load_adapter(model, **options) or load_policy(model, **options)
    zero3 = is_deepspeed_zero3_enabled()
    if peft_config is not None:
        model = add_adapter(model, peft_config, zero3=zero3)
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"peft_config: {type(model.active_peft_config).__name__} puts virtual tokens before each row, which "
                "have no place in the layouts of a batch: use LoraConfig or another adapter of weights."
            )
        if args.gradient_checkpointing:
            _fit_checkpointing_to_adapter(model, args, zero3=zero3)
    if args.disable_dropout:
        if has_dropout(model):
            logger.warning("Dropout of the model or its adapter (lora_dropout) is switched off: to keep it, set "
                           "disable_dropout to false.")  # fmt: skip
        disable_dropout(model)
    _fit_arguments(args, base_model(model).config)
    return model


def apply_kernels(models: list[PreTrainedModel], args) -> None:
    """Liger's kernels, if asked for, in policy and reference alike: log-ratios start at 0.

    The Trainer does it for the policy alone, when training begins, and again.
    """
    for model in models if args.use_liger_kernel else []:
        apply_liger_kernel(model, args.liger_kernel_config)


def _fit_arguments(args, config: PretrainedConfig) -> None:
    """Training arguments that a kind of model needs."""
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    if args.gradient_checkpointing and reentrant and router_loss(config) is not None:
        raise ValueError(
            "Reentrant gradient checkpointing runs the layers without gradients, so the loss of the router would "
            "change nothing: leave use_reentrant out of gradient_checkpointing_kwargs (with an adapter under ZeRO-3 "
            "set gradient_checkpointing to false), or set output_router_logits in the model's config to false."
        )
    # Text leaves the towers of a multimodal model without gradients, for which DDP would wait.
    if args.ddp_find_unused_parameters is None and config.get_text_config() is not config and not reentrant:
        args.ddp_find_unused_parameters = True


def refuse_frozen(model: nn.Module) -> None:
    """Raises ValueError for a policy of which no weight would be trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "No weight of the model is trainable, so nothing would be learned: load an adapter with is_trainable=True "
            "or give its folder as model, call requires_grad_(True) on what shall learn, or pass peft_config."
        )


def check_optimizer(optimizer, model: nn.Module) -> None:
    """Raises ValueError for an optimizer that was made for another model."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters() if parameter.requires_grad):
        raise ValueError(
            "optimizers: the optimizer holds none of the model's trainable weights, so nothing would be learned. Load "
            "the model first, add its adapter, and give this very model to the trainer; a path is loaded anew."
        )


def _fit_checkpointing_to_adapter(model: PeftModel, args, *, zero3: bool) -> None:
    """Gradient checkpointing under an adapter needs gradients at the input of the frozen base."""
    model.enable_input_require_grads()
    if zero3:  # DeepSpeed partitions adapters in the recomputed forward unless checkpointing is reentrant (#8130).
        options = {**(args.gradient_checkpointing_kwargs or {}), "use_reentrant": True}
        args.gradient_checkpointing_kwargs = args.activation_checkpointing_kwargs = options  # the old and the new name


def base_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a PEFT wrapper, or the model itself."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel), type(base)
    return base


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0, also the rates that attention modules keep as plain numbers."""
    disable_dropout_in_model(model)
    for module in model.modules():
        for name in PLAIN_RATES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def has_dropout(model: nn.Module) -> bool:
    """Whether any dropout rate is above 0."""
    return any(
        isinstance(module, nn.Dropout)
        and module.p > 0
        or any(isinstance(rate := getattr(module, name, None), float) and rate > 0 for name in PLAIN_RATES)
        for module in model.modules()
    )


def load_tokenizer(
    model: PreTrainedModel | PeftModel, init_kwargs: dict[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model; `init_kwargs` are those that the model was loaded with.

    Raises:
        ValueError: the model has no path to read a tokenizer from.
    """
    path = base_model(model).config.name_or_path
    if not path:
        raise ValueError("The model has no path to load a tokenizer from: pass processing_class=<tokenizer>.")
    return tokenizer_at(path, init_kwargs)


def tokenizer_at(path: str, init_kwargs: dict[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer at a path; `init_kwargs` are those that the model there is loaded with."""
    kwargs = init_kwargs or {}
    return AutoTokenizer.from_pretrained(
        path, revision=kwargs.get("revision") or "main", trust_remote_code=kwargs.get("trust_remote_code", False)
    )


def text_tokenizer(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer inside a multimodal processor, or the tokenizer itself: training is on text."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def context_length(config: PretrainedConfig) -> int | None:
    """The tokens that a model was made for, None where its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def table_sizes(model: PreTrainedModel) -> tuple[int, int | None]:
    """How many token ids a model can be fed and can predict, and how many positions where it has a table of them."""
    tokens = model.get_input_embeddings()
    # A layer under an adapter names its rows as one of its sizes; the weights of a sharded one are empty.
    rows = getattr(tokens, "num_embeddings", None) or getattr(tokens, "in_features", None) or head_rows(tokens)
    decoder, longest = model.get_decoder(), context_length(model.config)
    known = (tokens, getattr(tokens, "base_layer", None))
    learned = [m.num_embeddings for m in decoder.modules() if isinstance(m, nn.Embedding) and m not in known]
    fixed = [len(buffer) for buffer in decoder.buffers() if buffer.dim() == 2]
    # OPT's table begins with two rows that stand for no position. Most models compute positions and have no table.
    has_table = longest is not None and (longest in [*learned, *fixed] or longest + 2 in learned)
    return min(rows, head_rows(model.get_output_embeddings())), longest if has_table else None


def set_pad_token(tokenizer: PreTrainedTokenizerBase, pad_token: str | None) -> None:
    """Give the tokenizer its padding token.

    Raises:
        ValueError: it has none and none was named, or the named one is not a single known token.
    """
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ValueError(
                f"pad_token={pad_token!r} is not in the vocabulary: name a token that is, for example "
                f"{tokenizer.eos_token!r}."
            )
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token is None:
        raise ValueError(
            f"The tokenizer has no pad token: set pad_token, for example to {tokenizer.eos_token!r} "
            "(safe here, masks are never derived from it)."
        )
