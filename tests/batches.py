"""Batches of tensors as the collator gives them, made without a tokenizer."""

import torch


def make_batch(lengths: list[tuple[int, list[int]]], vocab: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """lengths: per prompt its length and those of its responses -> a padded batch with random tokens and scores."""
    generator = torch.Generator().manual_seed(seed)
    b, k = len(lengths), max(len(r) for _, r in lengths)
    p, r = max(n for n, _ in lengths), max(max(n) for _, n in lengths)

    def draw(*shape):
        return torch.randint(1, vocab, shape, generator=generator)

    batch = {
        "prompt_ids": draw(b, p),
        "prompt_mask": torch.zeros(b, p, dtype=torch.bool),
        "response_ids": draw(b, k, r),
        "response_mask": torch.zeros(b, k, r, dtype=torch.bool),
        "mask": torch.zeros(b, k, dtype=torch.bool),
        "scores": torch.rand(b, k, generator=generator),
    }
    for i, (prompt, responses) in enumerate(lengths):
        batch["prompt_mask"][i, :prompt] = True
        for j, n in enumerate(responses):
            batch["response_mask"][i, j, :n] = True
            batch["mask"][i, j] = True
    return batch


def make_alike(vocab: int) -> dict[str, torch.Tensor]:
    """Sequences that begin alike in every way: a draft and its sequels, one in the other, twice the same, equal
    prompts, a prompt that goes on where a response ends, and a prompt of which another one is the beginning."""
    batch = make_batch([(6, [7, 7, 5, 3, 1]), (6, [4, 4]), (13, [5, 2, 6]), (4, [3, 3])], vocab, seed=5)
    prompts, responses = batch["prompt_ids"], batch["response_ids"]
    responses[0, 1, :4] = responses[0, 0, :4]
    responses[0, 2, :2] = responses[0, 0, :2]
    responses[0, 3, :3] = responses[0, 0, :3]
    prompts[1, :6] = prompts[0, :6]
    responses[1, 0, :4], responses[1, 1, :4] = responses[0, 0, :4], responses[0, 0, :4]
    prompts[2, :13] = torch.cat([prompts[0, :6], responses[0, 1, :7]])
    prompts[3, :4] = prompts[0, :4]
    return batch


def with_holes(batch):
    """The same tokens, of which the first third of each response, the fifth and the last are not trained on."""
    mask = batch["response_mask"].clone()
    for i, j in batch["mask"].nonzero().tolist():
        n = int(mask[i, j].sum())
        mask[i, j, : n // 3] = False
        if n > 3:
            mask[i, j, [min(4, n - 1), n - 1]] = False
    return batch | {"response_mask": mask}


def real_responses(batch):
    """(prompt index, slot, prompt ids, response ids) of each response of a batch, up to the last token that is trained
    on."""
    for i, j in batch["mask"].nonzero().tolist():
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i]]
        yield i, j, prompt, batch["response_ids"][i, j, : batch["response_mask"][i, j].nonzero().max() + 1]


def own_log_softmax(model, prompt, response, dtype=None) -> torch.Tensor:
    """(R,V) from the model's own logits: the log-probability of every token where one of the response's is due."""
    ids = torch.cat([torch.as_tensor(prompt), torch.as_tensor(response)])
    return model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1, dtype=dtype)


def own_logps(model, prompt, response, dtype=None) -> torch.Tensor:
    """(R,) log-probabilities of a response's tokens, from the model's own logits."""
    return own_log_softmax(model, prompt, response, dtype).gather(-1, torch.as_tensor(response)[:, None])[:, 0]


RAGGED = [(5, [3, 1, 7, 4]), (1, [2, 6]), (9, [5, 5, 2]), (3, [1, 8, 3])]
