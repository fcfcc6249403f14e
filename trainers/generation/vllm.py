"""Sampling from a server that offers vLLM's completions endpoint."""

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from .backends import Request
from .sampler import Sample, SamplingConfig
from .server import Server, ServerError, in_flight


@dataclass
class VLLMServer:
    """A server started by `vllm serve`.

    Each request carries the seed of its sample. The engine draws from it, but the logits may differ in the last bits
    with what else is in its batch, so two runs are alike and not always the same.

    Args:
        model: the name under which the server offers the model.
        ends: ids that end a response.
        context: most tokens of a prompt with its response, None where the server says none.
    """

    server: Server
    model: str
    tokenizer: PreTrainedTokenizerBase
    ends: list[int]
    context: int | None = None

    def sample(self, requests: list[Request], config: SamplingConfig) -> Iterator[dict[int, Sample]]:
        """Raises ServerError where it cannot be reached, refuses a request, or gives half an answer."""
        return in_flight(lambda request: self._ask(request, config), requests, config.batch_size)

    def _ask(self, request: Request, config: SamplingConfig) -> Sample:
        # A server fills what is left out from the model's generation config.
        answer = self.complete(
            request.prompt_ids, seed=request.seed, max_tokens=config.max_new_tokens, temperature=config.temperature,
            top_p=config.top_p, top_k=config.top_k or 0, min_p=0.0, repetition_penalty=1.0, stop_token_ids=self.ends,
        )  # fmt: skip
        ids = answer["token_ids"]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)  # of one list of ids
        return Sample(text, ids, truncated=not ids or ids[-1] not in self.ends)

    def complete(self, prompt_ids: list[int], **options) -> dict:
        """The one choice of an answer, with its `token_ids`."""
        own = {"model": self.model, "prompt": prompt_ids, "return_token_ids": True}
        answer = self.server.ask("/v1/completions", own | options)
        try:
            [choice] = answer["choices"]
            assert choice["finish_reason"] in ("stop", "length") and isinstance(choice["token_ids"], list)
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise ServerError(
                f"{self.server.url} gave no whole answer with token_ids (vLLM 0.10.2 and later do): {answer!s:.300}"
            ) from error
        return choice
