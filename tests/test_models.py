"""Which models are taken, and which rows: encoders, bodies, tables of tokens and positions, multimodal checkpoints."""

import re
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    CTRLConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    LlamaForCausalLM,
    OPTConfig,
    ProcessorMixin,
    XGLMConfig,
)

from helpers import tiny_gemma3, tiny_llama
from test_trainer import logged, trainer
from trainers.forward.policy import table_sizes

BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4}
POSITIONS = 24


class Bodiless(LlamaForCausalLM):
    base_model_prefix = "body"


def gpt2(vocab):
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=POSITIONS, **GPT2))


def token_rows(prompt=3, response=4, token=5):
    return [{"prompt_ids": [4] * prompt, "response_ids": [[token] * response, [6]], "scores": [1.0, 0.0]}] * 4


@pytest.mark.parametrize("as_reference", [False, True])
@pytest.mark.parametrize(
    "build, word",
    [
        (lambda size: BartForConditionalGeneration(BartConfig(vocab_size=size, **BART)), "Bart.*has an encoder"),
        (lambda size: Bodiless(tiny_llama(size).config), "Bodiless.*base_model is itself"),
    ],
    ids=["bart", "bodiless"],
)
def test_models_that_are_no_decoder_with_a_body_are_refused(tmp_path, tokenizer, build, word, as_reference):
    other = build(len(tokenizer))
    models = {"model": tiny_llama(len(tokenizer)), "ref_model": other} if as_reference else {"model": other}
    with pytest.raises(ValueError, match=word):
        trainer(tmp_path, tokenizer, data=token_rows(), **models)


def test_sizes_of_tables():
    def sizes(config):
        return table_sizes(AutoModelForCausalLM.from_config(config))

    common = {"vocab_size": 61, "n_positions": POSITIONS}
    assert sizes(GPT2Config(**common, **GPT2)) == (61, POSITIONS)
    assert sizes(GPTJConfig(**common, **GPT2, rotary_dim=4)) == (61, POSITIONS)
    assert sizes(CTRLConfig(**common, **GPT2, dff=32)) == (61, POSITIONS)
    width = {"vocab_size": 61, "d_model": 32, "ffn_dim": 32, "max_position_embeddings": POSITIONS}
    assert sizes(XGLMConfig(**width, num_layers=1, attention_heads=4)) == (61, None)  # its table grows
    opt = {"vocab_size": 61, "hidden_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 32, "num_attention_heads": 4}
    assert sizes(OPTConfig(**opt, num_hidden_layers=1, max_position_embeddings=POSITIONS)) == (61, POSITIONS)
    assert table_sizes(tiny_llama(61, max_position_embeddings=POSITIONS)) == (61, None)
    targets = ["embed_tokens", "lm_head"]
    for adapter in (
        LoraConfig(target_modules=targets),
        LoraConfig(modules_to_save=targets, target_modules=["q_proj"]),
    ):
        assert table_sizes(get_peft_model(tiny_llama(61), adapter).get_base_model()) == (61, None)
    assert table_sizes(tiny_gemma3(61)) == (64, None)


@pytest.mark.parametrize("part", ["data", "eval_data"])
@pytest.mark.parametrize("layout", ["rows", "shared"])
def test_a_token_that_the_model_does_not_know_is_refused_before_training(tmp_path, tokenizer, part, layout):
    size = len(tokenizer)
    fine, token = token_rows(token=size - 1), size
    trainer(tmp_path, tokenizer, data=fine, layout=layout).train()
    # as the last token of a response it is predicted and never fed
    last = [{"prompt_ids": [4], "response_ids": [[5, token], [6]], "scores": [1.0, 0.0]}]
    for wrong in (token_rows(token=token), last, token_rows(token=-1)):
        with pytest.raises(ValueError, match="token ids from .* knows 0 to.*resize_token_embeddings"):
            trainer(tmp_path, tokenizer, **{"data": fine, part: fine + wrong}, layout=layout)
    with pytest.raises(ValueError, match=f"to {token}, but"):
        trainer(tmp_path, tokenizer, data=fine, ref_model=tiny_llama(size), model=tiny_llama(size + 1),
                eval_data=token_rows(token=token))  # fmt: skip


def test_a_row_that_is_longer_than_the_table_of_positions_is_refused_before_training(tmp_path, tokenizer):
    model = gpt2(len(tokenizer))
    fitting = token_rows(prompt=10, response=POSITIONS - 10 + 1)  # the last token is not fed
    t = trainer(tmp_path, tokenizer, model=model, data=fitting)
    t.train()
    assert t.state.global_step == 2
    longer = token_rows(prompt=10, response=POSITIONS - 10 + 2)
    # the longest row counts, not the longest prompt with the longest response of another row
    apart = [*fitting, {"prompt_ids": [4] * 15, "response_ids": [[5], [6]], "scores": [1.0, 0.0]}]
    trainer(tmp_path, tokenizer, model=gpt2(len(tokenizer)), data=apart)
    message = f"longest row has {POSITIONS + 2} tokens.*table of {POSITIONS} positions: set max_length"
    for parts in ({"data": longer}, {"data": fitting, "eval_data": longer}):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, tokenizer, model=gpt2(len(tokenizer)), **parts)
    with pytest.raises(ValueError, match=message):
        t.evaluate(Dataset.from_list(longer))
    trainer(tmp_path, tokenizer, model=gpt2(len(tokenizer)), data=longer, max_length=POSITIONS)


def test_rows_beyond_what_a_model_with_computed_positions_was_made_for_are_told(tmp_path, tokenizer):
    fitting, longer = (token_rows(prompt=10, response=POSITIONS - 10 + more) for more in (1, 2))
    message = f"longer than the {POSITIONS} tokens that LlamaForCausalLM was made for.*set max_length to {POSITIONS}"
    for rows, told in ((fitting, False), (longer, True)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = tiny_llama(len(tokenizer), max_position_embeddings=POSITIONS)
            trainer(tmp_path, tokenizer, model=model, data=rows)
        assert any(re.search(message, str(warning.message)) for warning in caught) == told


def test_a_processor_gives_its_tokenizer(tmp_path, tokenizer):
    class Processor(ProcessorMixin):
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

    t = trainer(tmp_path, Processor(tokenizer), tiny_llama(len(tokenizer)))
    assert t.processing_class is tokenizer and t.train_dataset[:] == trainer(tmp_path, tokenizer).train_dataset[:]


def test_a_model_with_towers_trains_on_text_in_both_layouts(tmp_path, tokenizer):
    losses = []
    for layout in ("rows", "shared"):
        t = trainer(tmp_path, tokenizer, model=tiny_gemma3(len(tokenizer)), layout=layout, gradient_checkpointing=True)
        assert t.args.ddp_find_unused_parameters  # text leaves the tower without gradients
        t.train()
        losses.append(logged(t))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    kept = trainer(tmp_path, tokenizer, model=tiny_gemma3(len(tokenizer)), ddp_find_unused_parameters=False)
    assert kept.args.ddp_find_unused_parameters is False
    assert trainer(tmp_path, tokenizer).args.ddp_find_unused_parameters is None
