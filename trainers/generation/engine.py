"""What samples from the weights of a stage: transformers in this process, or a server of vLLM's kind beside it.

A server is given by its address, or started by the stage: one per node, on the weights that the stage samples from,
and ended with it, also where the run is killed. No number of a training comes from a server: it gives token ids.
"""

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import PeftConfig
from transformers import AutoConfig, GenerationConfig

from ..runs.processes import Processes
from .backends import Backend, HuggingFace, end_ids
from .sampler import TRANSFORMERS, encode_prompt, is_address
from .server import KEY_VARIABLE, Server, ServerError
from .start import Weights
from .vllm import VLLMServer

# Variables of a launcher, which are about the processes of the training.
LAUNCHER = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "GROUP_", "ROLE_", "MASTER_", "OMP_NUM_THREADS")
PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
LONGEST_START, ENDING = 1800.0, 3.0  # seconds; the second is what a server that just died takes to be gone
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for
TAIL = 3000  # characters of a log in an error
# Of the check that the weights are the right ones.
ASKED, CHECKED, LENGTH = "Write a few sentences about the sea.", 4, 64  # a prompt, samples of it, and their tokens
MOST = 0.1  # mean nats per token that bfloat16 explains


@contextmanager
def opened(engine: str, weights: Weights, folder: Path | None) -> Iterator[Backend]:
    """The backend for the engine of `SamplingOptions`, ready to sample; every process must enter and leave.

    Args:
        folder: for the log of a server that is started.

    Raises:
        ServerError: the server cannot be reached or does not start, or serves none of these weights.
    """
    if engine == TRANSFORMERS:
        yield HuggingFace(weights.whole(), weights.tokenizer)
        return
    processes = Processes()
    with ExitStack() as stack:
        given = is_address(engine)
        if given:
            server = Server(engine)
        else:
            url = None
            if processes.is_local_main_process:
                log = (folder or Path(".")) / f"engine-{processes.process_index:05d}.log"
                url = stack.enter_context(started(shlex.split(engine), weights, log))
            urls = gather_object([url]) if processes.num_processes > 1 else [url]
            server = Server(urls[processes.first_of_node])
        offered = {entry["id"]: entry for entry in server.ask("/v1/models").get("data", [])}
        model = _find(server, offered, weights, processes, stack) if given else weights.name
        context = next((size for entry in offered.values() if (size := entry.get("max_model_len"))), None)
        backend = VLLMServer(server, model, weights.tokenizer, _ends(weights), context)
        if processes.is_local_main_process:
            check(backend, weights)
        processes.wait_for_everyone()  # no sample is kept before the check
        yield backend


def _ends(weights: Weights) -> list[int]:
    try:
        config = GenerationConfig.from_pretrained(weights.folder)
    except OSError:  # it has none of its own
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(weights.folder))
    return end_ids(config, weights.tokenizer)


def _find(server: Server, offered: dict, weights: Weights, processes: Processes, stack: ExitStack) -> str:
    """The name under which a given server offers the weights. An adapter that it lacks is loaded for a while."""
    if weights.adapter:
        if weights.name not in offered and processes.is_main_process:
            assert weights.start is not None
            path = weights.start.resolve() if weights.start.exists() else weights.start  # a hub id stays one
            adapter = {"lora_name": weights.name, "lora_path": str(path)}
            try:
                server.send("/v1/load_lora_adapter", adapter)
            except ServerError as error:
                raise ServerError(
                    f"{error}. To take adapters while it runs, the server must be started with --enable-lora "
                    "--max-lora-rank R, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment."
                ) from error
            stack.callback(_unload, server, weights.name)
        processes.wait_for_everyone()
        return weights.name
    names = {weights.name, weights.folder, str(Path(weights.folder).resolve())}
    whole = [name for name, entry in offered.items() if not entry.get("parent")]
    fitting = [name for name in whole if {name, offered[name].get("root")} & names] or whole
    if len(fitting) != 1:
        raise ServerError(
            f"{server.url} offers {', '.join(whole) or 'no model'}, and none by the name {weights.folder}: start it "
            f"with --served-model-name {weights.folder}."
        )
    return fitting[0]


def _unload(server: Server, adapter: str) -> None:
    with suppress(ServerError):  # it may have ended
        server.send("/v1/unload_lora_adapter", {"lora_name": adapter})


@contextmanager
def started(command: list[str], weights: Weights, log: Path) -> Iterator[str]:
    """The address of a server that runs inside the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = command.index("serve") + 1 if "serve" in command else len(command)  # vllm wants the model right there
    words = [*command[:place], weights.folder, *command[place:], *_arguments(command, weights)]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER) and name not in PLACES
    }
    leash = [sys.executable, str(Path(__file__).with_name("leash.py")), *words]
    print(f"  starting {shlex.join(words)}\n  its log: {log}", flush=True)
    with open(log, "ab") as file:
        process = subprocess.Popen(
            leash, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    except ServerError as error:
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDING)
        if process.returncode is None:
            raise
        raise ServerError(f"The engine ended with code {process.returncode}. {_tail(log)}") from error
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def _arguments(command: list[str], weights: Weights) -> list[str]:
    """What `vllm serve` is told of the weights, but for what the command says itself."""
    words = []
    if not any(word.startswith("--dtype") for word in command):
        dtype = (
            weights.dtype if weights.dtype not in (None, "auto") else AutoConfig.from_pretrained(weights.folder).dtype
        )
        words += ["--dtype", str(dtype).removeprefix("torch.")]
    if not weights.adapter:
        return [*words, "--served-model-name", weights.name]
    rank = PeftConfig.from_pretrained(str(weights.start)).r  # type: ignore[attr-defined]
    room = next((room for room in LORA_RANKS if room >= rank), rank)
    return [*words, "--enable-lora", "--max-lora-rank", str(room), "--lora-modules", f"{weights.name}={weights.start}"]


def _wait(process: subprocess.Popen, url: str, log: Path) -> None:
    """Returns when the server answers.

    Raises:
        ServerError: it ended, or takes too long; with the end of its log.
    """
    server, limit = Server(url, attempts=1, timeout=5), time.monotonic() + LONGEST_START
    while True:
        try:
            server.ask("/v1/models")
            return
        except ServerError as error:
            if error.status == 401:
                raise ServerError(f"{error}. Its key is read from {KEY_VARIABLE}: set that to the same.") from error
            if process.poll() is not None:
                raise
            if time.monotonic() > limit:
                raise ServerError(f"The engine did not answer in {LONGEST_START:.0f} seconds. {_tail(log)}") from None
            time.sleep(1)


def _tail(log: Path) -> str:
    return f"The end of {log}:\n{log.read_bytes()[-TAIL:].decode(errors='replace')}\n"


@torch.no_grad()
def check(backend: VLLMServer, weights: Weights) -> None:
    """Compares log-probabilities of a few samples, as the server gives them, with those of the policy on this CPU.

    Raises:
        ServerError: they differ by more than rounding, so that these are not the weights to sample from.
    """
    prompt: list | str = [{"role": "user", "content": ASKED}] if weights.tokenizer.chat_template else ASKED
    ids, differences = encode_prompt(weights.tokenizer, prompt), []
    policy = weights.whole("float32", torch.device("cpu"))  # fast on every CPU; devices may be the engine's
    for seed in range(CHECKED):
        choice = backend.complete(ids, seed=seed, max_tokens=LENGTH, temperature=1.0, logprobs=0)
        rows = torch.tensor([ids + choice["token_ids"]])
        logps = policy(rows).logits[0, len(ids) - 1 : -1].float().log_softmax(-1)
        own = logps.gather(-1, rows[0, len(ids) :, None])[:, 0]
        differences.append((own - torch.tensor(choice["logprobs"]["token_logprobs"])).abs())
    tokens = torch.cat(differences)
    told = f"the log-probabilities of {len(tokens)} sampled tokens differ by {tokens.mean():.2g} nats on average"
    if tokens.mean() > MOST:
        raise ServerError(
            f"{backend.server.url} does not serve the policy of {weights.start or weights.model}: {told}, and "
            f"rounding explains {MOST}. Start it with these weights, and give the same command again."
        )
    print(f"  {backend.server.url} serves the policy: {told}", flush=True)
