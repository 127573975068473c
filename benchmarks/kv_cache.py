"""What an int8 cache costs in quality, and saves in memory.

    python benchmarks/kv_cache.py MODEL TEXT [--tokens 1024] [--dtype float32] [--prompts 16]
    python benchmarks/kv_cache.py --configs config.json ...

With a model: KL divergence and equal greedy tokens of the int8 cache against the float cache, the
text read through the cache in chunks; the bytes of a cache of 8,192 tokens; and how many
continuations by S3D, one at a time, are those of plain decoding, with each cache. With config
files of HF: bytes of a row of 8,192 tokens from shapes alone.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import s3d_jax
from convert.families import family_of
from s3d_jax.lm import LM
from s3d_jax.nn.cache import cache_bytes, init_cache
from s3d_jax.nn.transformer import forward
from s3d_jax.weights.base import num_bytes

CONTEXT, CHUNK = 8192, 128
KINDS = (None, "int8")


def logits_through_the_cache(lm: LM, ids: np.ndarray) -> list[np.ndarray]:
    """Log-probabilities [CHUNK, V] of each chunk, which sees the ones before in the cache."""
    config = lm.config
    run = jax.jit(forward, static_argnums=0, donate_argnums=3)
    cache, found = init_cache(config, 1, len(ids) + 64, np.array([len(ids)])), []
    for start in range(0, len(ids), CHUNK):
        block = jnp.asarray(ids[None, start : start + CHUNK])
        cache = cache.replace(length=jnp.array([start], jnp.int32))
        logits, cache = run(config, lm.params, block, cache)
        found.append(np.asarray(jax.nn.log_softmax(logits[0]), np.float32))
    return found


def quality(models: dict[str | None, LM], ids: np.ndarray) -> dict[str, float]:
    """KL in nats, the share of equal greedy tokens, and both perplexities."""
    chunks = [logits_through_the_cache(models[kind], ids) for kind in KINDS]
    divergence, same, losses, first = [], [], ([], []), 0
    for p, q in zip(*chunks, strict=True):
        divergence += (np.exp(p) * (p - q)).sum(axis=-1, dtype=np.float64).tolist()
        same += (p.argmax(axis=-1) == q.argmax(axis=-1)).tolist()
        following = ids[first + 1 : first + 1 + len(p)]
        for loss, x in zip(losses, (p, q), strict=True):
            loss += (-x[np.arange(len(following)), following]).tolist()
        first += len(p)
    return {
        "tokens": len(ids),
        "kl": float(np.mean(divergence)),
        "kl_of_the_last_quarter": float(np.mean(divergence[-len(ids) // 4 :])),
        "largest_kl": float(np.max(divergence)),
        "same_token": float(np.mean(same)),
        "perplexity": float(np.exp(np.mean(losses[0]))),
        "perplexity_int8": float(np.exp(np.mean(losses[1]))),
    }


def lossless(lm: LM, prompts: list[list[int]], new: int) -> dict[str, int]:
    """Texts, and tokens before the first difference, in which S3D is plain decoding."""
    options = dict(max_new_tokens=new, eos_token_ids=())
    plain = [lm.generate(prompt, method="ar", **options)[0] for prompt in prompts]
    drafted = [lm.generate(prompt, adaptive=False, **options)[0] for prompt in prompts]
    pairs = [(a.tokens, b.tokens) for a, b in zip(plain, drafted, strict=True)]
    return {
        "texts": len(pairs),
        "same_texts": sum(a == b for a, b in pairs),
        "tokens": sum(map(len, (a for a, _ in pairs))),
        "same_beginning": sum(int(np.cumprod(np.equal(a, b)).sum()) for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("text", nargs="?", type=Path)
    parser.add_argument("--dtype")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--configs", nargs="*", type=Path, default=[])
    options = parser.parse_args()
    for path in options.configs:
        fields = json.loads(path.read_text())
        config = family_of(fields).config(fields).replace(dtype="bfloat16")
        sizes = [cache_bytes(config.replace(kv_cache=k), CONTEXT, None) for k in KINDS]
        print(path.name, config.head_dim, *(f"{size / 2**20:,.1f} MiB" for size in sizes))
    if options.model is None:
        return
    models = {k: s3d_jax.load(options.model, dtype=options.dtype, kv_cache=k) for k in KINDS}
    lm = models[None]
    ids = np.asarray(lm.tokenizer.encode(options.text.read_text()[: 8 * options.tokens]), np.int32)
    print(json.dumps({"precision": lm.config.precision} | quality(models, ids[: options.tokens])))
    for kind, model in models.items():
        cache = init_cache(model.config, 1, CONTEXT, np.ones(1))
        held, said = num_bytes((cache.keys, cache.values)), cache_bytes(model.config, CONTEXT, None)
        print(f"{kind}: {CONTEXT} tokens take {held / 2**20:.2f} MiB, computed {said / 2**20:.2f}")
    prompts = [ids[i * 60 : i * 60 + 30].tolist() for i in range(options.prompts)]
    for kind, model in models.items():
        if prompts:
            print(kind, json.dumps(lossless(model, prompts, options.new)), flush=True)


if __name__ == "__main__":
    main()
