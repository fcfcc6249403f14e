"""Small tokenizers and models built in memory, for tests without network or downloads, and hand-worked vectors."""

import gzip
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "what is the capital of France? it is Paris, of course",
    "say something kind to a friend who had a bad day today",
    "user assistant system model",
]

TOLERANCE = {"float64": 1e-9, "float32": 1e-5}  # of the vectors

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nbe kind<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)

# name: (chat template, BOS, EOS, further special tokens); Qwen has no BOS
FAMILIES = {
    "llama3": (
        LLAMA3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>"],
    ),
    "qwen": (QWEN, None, "<|im_end|>", ["<|im_start|>"]),
    "gemma": (GEMMA, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "mistral": (MISTRAL, "<s>", "</s>", ["[INST]", "[/INST]"]),
}


def build_tokenizer(
    chat_template: str | None = None,
    *,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str | None = "<pad>",
    special: list[str] = (),
    sentences: list[str] = SENTENCES,
    add_eos: bool = False,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 330 tokens; BOS is put before a text (and EOS after it with `add_eos`)."""
    tokens = [token for token in [pad, bos, eos, *special] if token is not None]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=tokens, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    if bos is not None:
        single = f"{bos} $A {eos}" if add_eos else f"{bos} $A"
        ends = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token is not None]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=chat_template
    )


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the chat template and the special tokens of a model family."""
    template, bos, eos, special = FAMILIES[name]
    return build_tokenizer(template, bos=bos, eos=eos, special=special)


def tiny_llama(vocab_size: int, *, seed: int = 0, **kwargs) -> LlamaForCausalLM:
    """A randomly initialised Llama (2 layers, width 32, 4 heads, 2 key-value heads) in float32."""
    config = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": torch.float32,
        **kwargs,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**config))


def tiny_gemma3(vocab_size: int, *, depth: int = 1) -> Gemma3ForConditionalGeneration:
    """A randomly initialised Gemma 3 with a tower of so many layers for images, in float32."""
    size = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    text = {**size, "vocab_size": vocab_size + 3, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = Gemma3Config(
        text_config=text, vision_config={**size, "num_hidden_layers": depth, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4, image_token_index=vocab_size, boi_token_index=vocab_size + 1,
        eoi_token_index=vocab_size + 2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma3ForConditionalGeneration(config).float()


def save_start(folder: Path, family: str | None = None) -> Path:
    """A folder with the tiny Llama and its tokenizer, for runs that read their start from disk."""
    tokenizer = family_tokenizer(family) if family else build_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    return folder


def flags(**options) -> list[str]:
    """`name=value` -> --name value; a list gives several values."""
    values = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    return [str(part) for name, parts in values.items() for part in (f"--{name}", *parts)]


def launch(inputs: Path, output: Path, **options) -> None:
    """`polypo train` in this process, with the `model` and the `rows.jsonl` of a folder."""
    from trainers.cli import train  # which takes seconds

    common = {
        "trainer": "SWEPOTrainer", "model_name_or_path": inputs / "model", "dataset_name": inputs / "rows.jsonl",
        "output_dir": output, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    train.main(flags(**common | options))


def vectors(name: str) -> dict[str, dict]:
    """The hand-worked cases of tests/vectors/NAME.json by their id."""
    content = json.loads((Path(__file__).parent / f"vectors/{name}.json").read_text())
    assert content["tolerance"].items() >= TOLERANCE.items()
    return {case["id"]: case for case in content["cases"]}


def cases_of(name: str, function: str):
    """Parametrises a test by the hand-worked cases of a function in tests/vectors/NAME.json."""
    cases = [case for case in vectors(name).values() if case["function"] == function]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["id"])


def close(found, expected, dtype="float64") -> None:
    """Asserts equal shapes and an error within the tolerance of the vectors, relative above 1 and absolute below."""
    found = found.detach().double().numpy() if isinstance(found, torch.Tensor) else np.asarray(found, dtype=float)
    expected = np.asarray(expected, dtype=float)
    assert found.shape == expected.shape
    error = np.abs(found - expected) / np.maximum(np.abs(expected), 1)
    assert error.max() <= TOLERANCE[str(dtype).removeprefix("torch.")], (found, expected)


def write_rows(path: Path, rows: list[dict]) -> str:
    """JSON lines, packed where the name ends in .gz."""
    path.parent.mkdir(exist_ok=True, parents=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def leave_processes() -> None:
    """End a worker of several processes at once: while the interpreter shuts down, gloo's threads abort some runs."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
