"""Writes the answers of SmolLM2-135M-Instruct that `answers.xz` holds, as `s3d distill` would.

    python recipes/smollm2_draft/answers.py MODEL PROMPTS.jsonl OUT.jsonl

`answers.xz` has the tokens of the answers alone, 16 bits each, each answer ended by 65535: those to
the first prompts of at most 128 tokens, in their order. PROMPTS must be the file that was answered.
"""

import argparse
import itertools
import json
import lzma
import sys
import zlib
from pathlib import Path

import numpy as np

from s3d_jax.storage.native import read_header
from s3d_jax.storage.tokenizer import read_tokenizer
from s3d_jax.texts.documents import read_documents

END, LONGEST = 65535, 128
PROMPTS_CRC32 = 1315430024


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a native checkpoint, for its tokenizer")
    parser.add_argument("prompts", type=Path, help='one {"messages": [...]} a line (.gz too)')
    parser.add_argument("out", type=Path)
    options = parser.parse_args()

    packed = lzma.decompress(Path(__file__).with_name("answers.xz").read_bytes())
    tokens = np.frombuffer(packed, "<u2")
    ends = np.flatnonzero(tokens == END)
    starts = [0, *(ends[:-1] + 1)]
    answers = [tokens[a:b].tolist() for a, b in zip(starts, ends, strict=True)]

    tokenizer = read_tokenizer(options.model)
    ends_of_text = read_header(options.model).eos_token_ids
    documents = read_documents([options.prompts], tokenizer, ends_of_text[0], prompts=True)
    all_prompts = (d.tokens[: d.prompt_tokens] for d in documents)
    short = (p for p in all_prompts if len(p) <= LONGEST)
    prompts = list(itertools.islice(short, len(answers)))
    found = zlib.crc32(np.concatenate(prompts).astype("<i4").tobytes())
    if found != PROMPTS_CRC32:
        print(f"error: {options.prompts} is not the file that was answered", file=sys.stderr)
        return 2
    with options.out.open("w") as file:
        for prompt, answer in zip(prompts, answers, strict=True):
            file.write(json.dumps({"prompt_tokens": prompt.tolist(), "tokens": answer}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
