"""Optional back end: sampling with vLLM, in this process or from a server.

NOT TESTED WITH vLLM ITSELF: the machines this project is developed on have none. The server path is tested against
a stand-in that answers in the documented format. Requests carry one seed per sample, which vLLM honours for equal
batches only, so samples may differ between runs. `batch_size` is the number of requests in flight: some hundreds
serve vLLM well. Load the current weights before each round; nothing here does.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from tqdm.auto import tqdm

from .sampler import Key, Prompt, Sample, SamplingConfig, encode_prompts, sample_seed


def sample_responses_vllm(
    engine,
    tokenizer,
    prompts: list[Prompt],
    config: SamplingConfig,
    *,
    round: int = 0,
    progress: bool = True,
    known: Mapping[Key, Sample] | None = None,
    on_batch: Callable[[dict[Key, Sample]], None] | None = None,
    model: str | None = None,
    timeout: float = 600.0,
) -> list[list[Sample]]:
    """As `sample_responses`, for one process.

    Args:
        engine: a `vllm.LLM`, or the URL of a server started by `vllm serve`, such as "http://localhost:8000".
        model: the name under which the server offers the model; needed with a URL.
        timeout: seconds to wait for one answer of the server.

    Raises:
        ValueError: a URL without `model`.
        RuntimeError: the server cannot be reached or refuses a request; the message carries its answer.
    """
    if isinstance(engine, str) and model is None:
        raise ValueError("Sampling from a vLLM server needs `model`, the name under which it serves the model.")
    known = dict(known or {})
    encoded = encode_prompts(tokenizer, prompts)
    keys = [(i, j) for i in range(len(prompts)) for j in range(config.num_generations)]
    todo = [key for key in keys if key not in known]
    with tqdm(total=len(todo), desc="sampling (vLLM)", unit="seq", disable=not progress) as bar:
        for start in range(0, len(todo), config.batch_size):
            batch = todo[start : start + config.batch_size]
            rows = [encoded[i] for i, _ in batch]
            seeds = [sample_seed(config.seed, round, prompts[i], j) for i, j in batch]
            if isinstance(engine, str):
                samples = _from_server(engine, model, rows, seeds, config, tokenizer, timeout)
            else:
                samples = _in_process(engine, rows, seeds, config)
            new = dict(zip(batch, samples, strict=True))
            known.update(new)
            bar.update(len(new))
            if on_batch is not None:
                on_batch(new)
    return [[known[i, j] for j in range(config.num_generations)] for i in range(len(prompts))]


def _in_process(engine, rows: list[list[int]], seeds: list[int], config: SamplingConfig) -> list[Sample]:
    try:
        from vllm import SamplingParams, TokensPrompt
    except ImportError as error:
        raise ImportError("Sampling with a vllm.LLM needs vLLM: pip install vllm") from error
    shared = {
        "max_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k or 0,
    }
    params = [SamplingParams(seed=seed, **shared) for seed in seeds]
    outputs = engine.generate([TokensPrompt(prompt_token_ids=row) for row in rows], params, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    return [Sample(a.text, list(a.token_ids), a.finish_reason == "length") for a in answers]


def _from_server(url, model, rows, seeds, config: SamplingConfig, tokenizer, timeout: float) -> list[Sample]:
    def ask(row: list[int], seed: int) -> Sample:
        request = {
            "model": model,
            "prompt": row,
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k or 0,
            "repetition_penalty": 1.0,  # a server fills what is left out from the model's generation config
            "seed": seed,
            "return_token_ids": True,
        }
        choice = _post(f"{url.rstrip('/')}/v1/completions", request, timeout)["choices"][0]
        ids = choice.get("token_ids")
        if ids is None:  # an older server: the text encoded again, which need not give back the sampled tokens
            ids = tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
        return Sample(choice["text"], list(ids), choice["finish_reason"] == "length")

    with ThreadPoolExecutor(max_workers=max(1, min(len(rows), 64))) as pool:
        return list(pool.map(ask, rows, seeds))


def _post(url: str, content: dict, timeout: float) -> dict:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(content).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"vLLM server {url} refused a request: {error.read().decode(errors='replace')}") from error
    except OSError as error:
        raise RuntimeError(f"vLLM server {url} cannot be reached: {error}") from error
