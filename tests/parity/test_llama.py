"""Against HF transformers: logits and greedy tokens, through the converter, in float32."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import convert
import s3d_jax
from s3d_jax.nn.transformer import forward_logits
from tests.conftest import need
from tests.sampled import sampled

torch = need("torch")
transformers = need("transformers")

DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
ROPES = {
    "default": DEFAULT,
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
}
SHAPES = {
    "gqa": dict(num_attention_heads=6, num_key_value_heads=2, head_dim=14),
    "mha, tied": dict(num_attention_heads=6, num_key_value_heads=6, tie_word_embeddings=True),
    "mqa, biases": dict(
        num_attention_heads=5, num_key_value_heads=1, head_dim=6, attention_bias=True, mlp_bias=True
    ),
    "gelu": dict(num_attention_heads=6, num_key_value_heads=3, hidden_act="gelu_pytorch_tanh"),
}


def hf_model(rope: dict, **shape):
    sizes = dict(vocab_size=97, hidden_size=60, intermediate_size=88, num_hidden_layers=3)
    config = transformers.LlamaConfig(
        **sizes, **shape, max_position_embeddings=256, rope_parameters=rope, eos_token_id=None
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.15) if parameter.ndim == 2 else parameter.data.uniform_(
            0.5, 1.5
        )
    return model


def converted(model, folder: Path, **options) -> s3d_jax.LM:
    model.save_pretrained(folder / "hf")
    convert.convert(folder / "hf", folder / "native", parity=False, progress=False)
    return s3d_jax.load(folder / "native", **options)


def logit_difference(model, lm: s3d_jax.LM, tokens: np.ndarray) -> float:
    with torch.inference_mode():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    ours = np.asarray(forward_logits(lm.config, lm.params, jnp.asarray(tokens)))
    assert np.abs(theirs).max() > 1  # or a small difference would say little
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize(
    "shape, rope",
    sampled(
        [*((shape, "default") for shape in SHAPES), ("gqa", "linear"), ("gqa", "dynamic")],
        [("mqa, biases", "default"), ("gqa", "dynamic")],
    ),
)
def test_logits_of_random_models(tmp_path, shape, rope):
    tokens = np.random.default_rng(0).integers(0, 97, (1, 700))
    for length in (3, 700):  # short first: HF's dynamic rope remembers the longest
        model = hf_model(ROPES[rope], **SHAPES[shape])
        lm = converted(model, tmp_path / str(length))
        assert logit_difference(model, lm, tokens[:, :length]) <= 2e-4


def test_dynamic_rope_generates_as_hf_does(tmp_path):
    """The base grows with every token past the original length; old keys keep their base."""
    model = hf_model(ROPES["dynamic"], **SHAPES["gqa"])
    lm = converted(model, tmp_path, max_length=512)
    prompt = np.random.default_rng(1).integers(0, 97, 240)
    with torch.inference_mode():
        ids = torch.tensor(prompt)[None]
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False
        )
    for method in ("ar", "s3d"):
        ours = lm.generate([prompt], max_new_tokens=64, method=method)[0].tokens
        assert ours == theirs[0, 240:].tolist()


def story_openings(data_dir: Path, tokenizer, count: int, length: int) -> list[list[int]]:
    """The first `length` tokens, more or less, of `count` held-out stories."""
    text = (data_dir / "text" / "tinystories_valid.txt").read_text()
    stories = [s.strip() for s in text.split("\n\n") if len(s.strip()) > 4 * length]
    return [tokenizer.encode(s)[: length - i % 7] for i, s in enumerate(stories[:count])]


@pytest.mark.parametrize("name", sampled(["babyllama-1m", "stories260k"], ["babyllama-1m"]))
def test_real_checkpoints(data_dir, tmp_path, name):
    """Logits within 1e-4, and 32 greedy continuations of 200 tokens; another only at a tie."""
    source = data_dir / "checkpoints" / name
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    convert.convert(source, tmp_path / "native", parity=False, progress=False)
    lm = s3d_jax.load(tmp_path / "native")
    prompts = story_openings(data_dir, lm.tokenizer, 32, 40)
    assert len(prompts) == 32
    ours = [
        r.tokens for r in lm.generate(prompts, max_new_tokens=200, method="ar", eos_token_ids=())
    ]
    ties = 0
    for prompt, tokens in zip(prompts, ours, strict=True):
        # Each token is HF's choice after those before it: then the texts are the same to the end.
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        chosen = torch.tensor(tokens)
        short = logits.max(-1).values - logits[torch.arange(200), chosen]
        assert len(chosen) == 200 and float(short.max()) <= 1e-4
        ties += int((logits.argmax(-1) != chosen).any())
    assert ties <= 2
    full = np.array([prompts[0][:30] + ours[0]])
    assert logit_difference(model, lm, full) <= 1e-4
