"""Optional back end: sampling with vLLM, in this process or from a server.

NOT TESTED WITH vLLM ITSELF: the machines this project is developed on have none. The server path is tested against
a stand-in that answers in the documented format. Requests carry one seed per sample, which vLLM honours for equal
batches only, so samples may differ between runs. `batch_size` is the number of requests in flight: some hundreds
serve vLLM well. Load the current weights before each round; nothing here does.
"""

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .backends import Request
from .sampler import Sample, SamplingConfig


@dataclass
class VLLM:
    """A `vllm.LLM` in this process."""

    engine: Any
    tokenizer: PreTrainedTokenizerBase
    context = None  # vLLM knows

    def sample(self, requests: list[Request], config: SamplingConfig) -> list[Sample]:
        from vllm import SamplingParams, TokensPrompt  # not installed with the project

        params = [SamplingParams(seed=request.seed, **_options(config)) for request in requests]
        prompts = [TokensPrompt(prompt_token_ids=request.prompt_ids) for request in requests]
        outputs = self.engine.generate(prompts, params, use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        return [Sample(a.text, list(a.token_ids), a.finish_reason == "length") for a in answers]


@dataclass
class VLLMServer:
    """A server started by `vllm serve`.

    Args:
        url: such as "http://localhost:8000".
        model: the name under which the server offers the model.
        timeout: seconds to wait for one answer.
    """

    url: str
    model: str
    tokenizer: PreTrainedTokenizerBase
    timeout: float = 600.0
    context = None  # the server knows

    def sample(self, requests: list[Request], config: SamplingConfig) -> list[Sample]:
        """Raises RuntimeError, with the server's answer, where it cannot be reached or refuses a request."""
        with ThreadPoolExecutor(max_workers=min(len(requests), 64)) as pool:
            return list(pool.map(lambda request: self._ask(request, config), requests))

    def _ask(self, request: Request, config: SamplingConfig) -> Sample:
        own = {"model": self.model, "prompt": request.prompt_ids, "seed": request.seed, "return_token_ids": True}
        # A server fills what is left out from the model's generation config.
        choice = self._post(own | _options(config) | {"repetition_penalty": 1.0})["choices"][0]
        ids = choice.get("token_ids")
        if ids is None:  # an older server: the text encoded again, which need not give back the sampled tokens
            ids = self.tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
        return Sample(choice["text"], list(ids), choice["finish_reason"] == "length")

    def _post(self, content: dict) -> dict:
        url = f"{self.url.rstrip('/')}/v1/completions"
        request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")
            raise RuntimeError(f"vLLM server {url} refused a request: {told}") from error
        except OSError as error:
            raise RuntimeError(f"vLLM server {url} cannot be reached: {error}") from error


def _options(config: SamplingConfig) -> dict:
    names = {"max_tokens": config.max_new_tokens, "temperature": config.temperature, "top_p": config.top_p}
    return names | {"top_k": config.top_k or 0}
