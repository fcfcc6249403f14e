"""An engine for tests: `python tiny_engine.py serve FOLDER --port N ...` answers what PolyPO asks of `vllm serve`.

It samples with transformers and the seed of the request, so its samples are those of the engine in the process.
"""

import argparse
import os
import threading
from contextlib import nullcontext

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from servers import serving
from trainers.generation import HuggingFace, Request, SamplingConfig


class Engine:
    """Whole weights under a name, and adapters on them under theirs."""

    def __init__(self, folder: str, name: str, dtype: str = "float32", adapters: dict[str, str] | None = None):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.tokenizer, self.folder, self.name = AutoTokenizer.from_pretrained(folder), folder, name
        self.adapters, self.lock = {}, threading.Lock()
        for adapter, path in (adapters or {}).items():
            self.add(adapter, path)

    def add(self, name: str, path: str) -> None:
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(path, adapter_name=name)
        else:
            self.model = PeftModel.from_pretrained(self.model, path, adapter_name=name)
        self.adapters[name] = path

    def answer(self, path: str, content: dict | None, count: int) -> tuple[int, dict | bytes]:
        if path == "/v1/models":
            base = {"id": self.name, "root": self.folder, "parent": None, "max_model_len": 300}
            rest = [{"id": name, "root": root, "parent": self.name} for name, root in self.adapters.items()]
            return 200, {"data": [base, *rest]}
        if path == "/v1/load_lora_adapter":
            self.add(content["lora_name"], content["lora_path"])
            return 200, b"Success: LoRA adapter added successfully."
        if path == "/v1/unload_lora_adapter":
            del self.adapters[content["lora_name"]]
            return 200, b"Success: LoRA adapter removed successfully."
        if content["model"] not in (self.name, *self.adapters):
            return 404, {"error": f"no model {content['model']}"}
        with self.lock:
            return 200, {"choices": [self.complete(**content)]}

    def complete(
        self, *, model, prompt, seed, max_tokens, temperature, top_p=1.0, top_k=0, logprobs=None, **rest
    ) -> dict:
        config = SamplingConfig(max_new_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
        if model in self.adapters:
            self.model.set_adapter(model)
        plain = isinstance(self.model, PeftModel) and model == self.name
        with self.model.disable_adapter() if plain else nullcontext(), torch.no_grad():
            [[sample]] = [list(p.values()) for p in
                          HuggingFace(self.model, self.tokenizer).sample([Request(prompt, seed)], config)]  # fmt: skip
            logits = self.model(torch.tensor([prompt + sample.token_ids])).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1).gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0].tolist()
        reason = "length" if sample.truncated else "stop"
        return {"token_ids": sample.token_ids, "finish_reason": reason, "logprobs": {"token_logprobs": logps}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("folder")
    parser.add_argument("--served-model-name")
    parser.add_argument("--dtype")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--max-lora-rank", type=int)
    parser.add_argument("--lora-modules")
    parser.add_argument("--dies-after", type=int)  # answers, as an engine does that is out of memory
    args = parser.parse_args()
    adapters = dict([args.lora_modules.split("=", 1)]) if args.lora_modules else {}
    engine = Engine(args.folder, args.served_model_name or args.folder, args.dtype, adapters)

    def answer(path, content, count):
        if args.dies_after is not None and count > args.dies_after:
            print("out of memory", flush=True)
            os._exit(3)
        return engine.answer(path, content, count)

    with serving(answer, port=args.port):
        threading.Event().wait()


if __name__ == "__main__":
    main()
