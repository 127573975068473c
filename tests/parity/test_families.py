"""Every family against HF transformers: weights, logits and greedy tokens, there and back.

The models are tiny and random, with everything switched on that the family has, in odd sizes and
with more than one layer of each kind. Float32 throughout.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
import s3d_jax
from convert import plan, to_hf
from convert.families import FAMILIES
from s3d_jax.nn.transformer import forward_logits
from tests.conftest import need
from tests.sampled import sampled

torch = need("torch")
transformers = need("transformers")

SIZES = dict(
    vocab_size=97,
    hidden_size=60,
    intermediate_size=88,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
LOCAL, GLOBAL = "sliding_attention", "full_attention"
MIXED = [LOCAL, GLOBAL, LOCAL, GLOBAL]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "beta_fast": 12.0,
    "original_max_position_embeddings": 256,
}
LONGROPE = {  # of the 4 pairs of 8 rotated entries
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.2, 2.5, 4.0, 9.0],
    "original_max_position_embeddings": 40,  # between both prompts: a text grows past it
}
GEMMA = dict(num_attention_heads=4, head_dim=22, query_pre_attn_scalar=19, attention_bias=True)

TOKENS = np.random.default_rng(0).integers(0, 97, 700)
STD = {"embed": 0.1, "lm_head": 0.15}  # of weights; smaller ones inside would repeat one token
POST_NORMS = ("Gemma2", "Gemma3Text", "Olmo2")
MODELS = {
    "llama": ("Llama", dict(head_dim=14, rope_parameters=LLAMA3, attention_bias=True)),
    "mistral": ("Mistral", dict(head_dim=14, sliding_window=21)),
    "phi3": ("Phi3", dict(sliding_window=250)),
    "phi4": (
        "Phi3",
        dict(
            rope_parameters=LONGROPE | {"partial_rotary_factor": 0.8},
            original_max_position_embeddings=40,
            tie_word_embeddings=True,
        ),
    ),
    "qwen2": ("Qwen2", dict(use_sliding_window=True, sliding_window=21, max_window_layers=2)),
    "qwen3": (
        "Qwen3",
        dict(
            head_dim=14,
            use_sliding_window=True,
            sliding_window=21,
            max_window_layers=2,
            rope_parameters=YARN,
        ),
    ),
    "gemma": ("Gemma", dict(num_attention_heads=4, num_key_value_heads=1, head_dim=22)),
    "gemma2": (
        "Gemma2",
        dict(
            **GEMMA,
            sliding_window=21,
            attn_logit_softcapping=2.5,
            final_logit_softcapping=9.0,
        ),
    ),
    "gemma3": (
        "Gemma3Text",
        dict(
            **GEMMA,
            sliding_window=21,
            layer_types=MIXED,
            rope_parameters={
                GLOBAL: {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
                LOCAL: {"rope_type": "default", "rope_theta": 500.0},
            },
        ),
    ),
    "olmo2": ("Olmo2", dict(attention_bias=True)),
    "granite": (
        "Granite",
        dict(
            embedding_multiplier=3.5,
            attention_multiplier=0.21,
            residual_multiplier=0.72,
            logits_scaling=2.5,
            mlp_bias=True,
        ),
    ),
    "smollm3": (
        "SmolLM3",
        dict(no_rope_layers=[1, 0, 1, 0], use_sliding_window=True, sliding_window=21),
    ),
}


def hf_model(name: str, images: dict | None = None, *, models=MODELS, sizes={}):  # noqa: B006
    """A random model of `models`; with the settings of images, it is the text model inside."""
    kind, features = models[name]
    config = getattr(transformers, f"{kind}Config")(**(SIZES | sizes | features))
    if images is not None:
        config = transformers.Gemma3Config(text_config=config.to_dict(), **images)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    offset = 1.0 if kind.startswith("Gemma") else 0.0  # is added to the scales of norms
    for key, parameter in model.named_parameters():
        if key.endswith("bias") or parameter.ndim == 2:
            std = next((std for part, std in STD.items() if part in key), 0.22)
            parameter.data.normal_(0, std)
            continue
        # The mean of a long context hardly changes. A norm after attention would amplify it, and
        # all models would repeat one token.
        post = {"post_attention": 0.3, "post_feedforward": 2.0} if kind in POST_NORMS else {}
        scale = next((x for part, x in post.items() if part in key), 1.0)
        parameter.data.uniform_(0.5 * scale - offset, 1.5 * scale - offset)
    return model.eval()


def hf_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor(tokens)).logits.numpy()


def hf_greedy(model, prompt: np.ndarray, new_tokens: int) -> list[int]:
    ids = torch.tensor(prompt)[None]
    options = dict(attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        return model.generate(ids, max_new_tokens=new_tokens, **options)[0, len(prompt) :].tolist()


def loaded_export(native: Path, out: Path, hf_silent):
    """Our export as transformers loads it, without any warning."""
    convert.export(native, out, progress=False)
    with hf_silent():
        model = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    return model.eval()


@pytest.mark.parametrize("name", sampled(list(MODELS), ["phi4"]))
def test_family(name, tmp_path, hf_silent, monkeypatch):
    model = hf_model(name)
    model.save_pretrained(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "native", parity=False, progress=False)
    lm = s3d_jax.load(tmp_path / "native")

    theirs = assert_equal(name, model, lm)

    # Back to HF: with the config of the original, and with one written from scratch.
    exported = loaded_export(tmp_path / "native", tmp_path / "back", hf_silent)
    source, back = (load_file(tmp_path / x / "model.safetensors") for x in ("hf", "back"))
    assert source.keys() == back.keys()
    for key, tensor in source.items():
        assert tensor.dtype == back[key].dtype and tensor.tobytes() == back[key].tobytes(), key
    family = FAMILIES[model.config.model_type]
    assert family.config(family.write(lm.config)) == lm.config
    header = json.loads((tmp_path / "native" / "config.json").read_text())
    header["source"] = {}
    (tmp_path / "native" / "config.json").write_text(json.dumps(header))
    monkeypatch.setattr(to_hf, "family_for_export", lambda config: family)
    fresh = loaded_export(tmp_path / "native", tmp_path / "fresh", hf_silent)
    assert type(fresh) is type(exported) is type(model)
    for again in (exported, fresh):
        np.testing.assert_array_equal(hf_logits(again, TOKENS[None]), theirs)


def assert_equal(name: str, model, lm: s3d_jax.LM) -> np.ndarray:
    """Compares logits and greedy tokens of a short and a long prompt; returns HF's long logits."""
    prompts = [TOKENS[:3], TOKENS]
    for prompt in prompts:
        theirs = hf_logits(model, prompt[None])
        ours = np.asarray(forward_logits(lm.config, lm.params, jnp.asarray(prompt[None])))
        assert np.abs(theirs).max() > 1  # or a small difference would say little
        difference = np.abs(ours - theirs).max()
        print(name, len(prompt), "max logit", np.abs(theirs).max(), "difference", difference)
        assert difference <= 2e-4

    expected = [hf_greedy(model, prompt, 64) for prompt in prompts]
    assert all(len(set(row)) > 1 for row in expected)
    for options in (
        dict(method="ar"),
        # The draft is the model itself for one token: some drafts are accepted, some rolled back.
        dict(method="s3d", gamma=2, skip=[False] * 4, adaptive=False),
    ):
        results = lm.generate(prompts, max_new_tokens=64, **options)
        assert [result.tokens for result in results] == expected
        if options["method"] == "s3d":
            assert all(2 <= r.stats.tokens_per_iteration < 3 for r in results)
    return theirs


VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
IMAGES = dict(
    vision_config=VISION | dict(image_size=28, patch_size=14),
    mm_tokens_per_image=4,
    image_token_index=96,
)


@pytest.mark.parametrize("spelling", sampled(["published", "of the modules"], ["published"]))
def test_the_text_model_of_a_multimodal_gemma3(spelling, tmp_path, hf_silent):
    """From 4B on, settings and weights have parts for text; exports hold only these."""
    model = hf_model("gemma3", IMAGES)
    model.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    source = load_file(file)
    if spelling == "of the modules":
        tensors = {
            f"model.{name.replace('language_model.model.', 'language_model.')}": tensor
            for name, tensor in source.items()
        }
        assert tensors.keys() <= model.state_dict().keys()
        save_file(tensors, file, {"format": "pt"})
    report = convert.convert(tmp_path / "hf", tmp_path / "native", progress=False)
    assert report.parity is not None and report.parity.max_difference <= 2e-4
    text = {name.removeprefix("language_model."): x for name, x in source.items() if "lang" in name}
    assert len(report.unneeded) == len(source) - len(text) > 10
    assert set(report.unneeded.values()) == {"images are not supported"}
    _, entries = plan.inspect(tmp_path / "hf")
    assert {entry.name for entry in entries} == load_file(file).keys()
    assert not any(entry.is_fault for entry in entries)

    theirs = assert_equal(spelling, model, s3d_jax.load(tmp_path / "native"))
    exported = loaded_export(tmp_path / "native", tmp_path / "back", hf_silent)
    assert type(exported) is transformers.Gemma3ForCausalLM
    np.testing.assert_array_equal(hf_logits(exported, TOKENS[None]), theirs)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == text.keys()
    assert all(tensor.tobytes() == back[name].tobytes() for name, tensor in text.items())
