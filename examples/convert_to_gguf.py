"""A pruned or smaller Llama as one GGUF file, which llama.cpp and what is built on it read.

    python examples/convert_to_gguf.py smaller smaller.gguf --dtype float16

Sizes come from the directory's configuration, so a model with fewer channels or heads is written as it is.
The names of tensors are those of the package ``gguf``; rows of queries and keys change from the order of
transformers (both halves of a rotation one after the other) to llama.cpp's (pairs). The tokenizer must be a
byte-level BPE, as that of Llama 3 or SmolLM; ``--pre`` is llama.cpp's name for how it splits words.
Quantise the file with llama.cpp's own tool; its K-quants need widths that are multiples of 256.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from torch import Tensor

from sparseswaps.errors import InputError
from sparseswaps.models.loading import load_model

DTYPES = {"float32": torch.float32, "float16": torch.float16}
FILE_TYPES = {"float32": gguf.LlamaFileType.ALL_F32, "float16": gguf.LlamaFileType.MOSTLY_F16}


def pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads · head size, cols) of queries or keys in the order that rotates neighbours."""
    rows, cols = weight.shape
    return weight.view(heads, 2, rows // heads // 2, cols).transpose(1, 2).reshape(rows, cols)


def add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    """What the configuration says of shapes and rotations."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"rotations of the model: expected the default kind, found {rope['rope_type']}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary: int, pre: str) -> None:
    """Tokens, their kinds and merges, from ``tokenizer.json``."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"tokenizer of {folder}: expected {path.name}, found none")
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["model"]["type"] != "BPE" or found["model"].get("byte_fallback"):
        raise InputError(f"tokenizer {path}: expected a byte-level BPE, found {found['model']['type']}")
    tokens = {number: token for token, number in found["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in found["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    numbers = range(vocabulary)  # an embedding may have more rows than there are tokens
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in numbers])
    writer.add_token_types([kinds.get(number, gguf.TokenType.UNUSED) for number in numbers])
    merges = found["model"]["merges"]
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def convert(folder: Path, out: Path, dtype: str = "float16", pre: str = "smollm") -> None:
    """Write the model in ``folder`` as ``out``.

    Raises:
        InputError: for another family than Llama, or what llama.cpp has no place for.
    """
    model = load_model(folder, "cpu", "checkpoint").model
    config: Any = model.config
    if config.model_type != "llama":
        raise InputError(f"model {folder}: expected one of the family llama, found {config.model_type}")
    writer = gguf.GGUFWriter(str(out), "llama")
    add_sizes(writer, config)
    add_tokenizer(writer, folder, config.vocab_size, pre)
    writer.add_name(folder.name)
    writer.add_file_type(FILE_TYPES[dtype])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.named_parameters():  # a tied head is there once, as llama.cpp wants it
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if written is None:
            raise InputError(f"tensor {name} of {folder}: expected one that llama.cpp knows, found none such")
        layer = name.split(".")[-2]
        if layer in heads:
            columns = tensor if tensor.ndim == 2 else tensor[:, None]
            tensor = pairs(columns, heads[layer]).reshape(tensor.shape)
        kind = torch.float32 if tensor.ndim == 1 else DTYPES[dtype]
        writer.add_tensor(written, tensor.detach().to(kind).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="directory of a Llama")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of matrices")
    parser.add_argument("--pre", default="smollm", help="llama.cpp's name of how the tokenizer splits words")
    given = parser.parse_args()
    try:
        convert(given.model, given.out, given.dtype, given.pre)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"{given.out}: {given.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
