"""What each family reads from a config.json, and what it refuses."""

import copy
import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.families import FAMILIES, Family, family_of, native_shape
from s3d_jax.errors import ConfigError
from s3d_jax.nn import transformer as model
from s3d_jax.settings.model import ModelConfig, RopeConfig
from s3d_jax.storage.trees import flatten

SIZES = dict(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=512,
)


def read(model_type: str, **fields) -> ModelConfig:
    return family_of({"model_type": model_type}).config(SIZES | fields)


def refused(model_type: str, **fields) -> str:
    with pytest.raises(ConfigError) as caught:
        fields = {"model_type": model_type} | SIZES | fields
        family_of(fields).config(fields)
    return str(caught.value)


# --- real configs ---------------------------------------------------------------------------------

PARAMETERS = {
    "Llama-2-7b-chat-hf": 6_738_415_616,
    "Llama-3.2-1B": 1_235_814_400,
    "Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "Phi-3-mini-4k-instruct": 3_821_079_552,
    "Phi-3-vision-128k_text_su_rope": 3_821_079_552,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen3-8B": 8_190_735_360,
    "mlc_Llama-2-13b": 13_015_864_320,
    "mlc_Mistral-7B-v0.1": 7_241_732_096,
    "mlc_Phi-4-mini-instruct": 3_836_021_760,
    "mlc_Qwen2-0.5B": 494_032_768,
    "mlc_Qwen3-0.6B": 596_049_920,
    "mlc_SmolLM-135M": 134_515_008,
    "mlc_TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "mlc_gemma-2b": 2_506_172_416,
    "mlc_gemma-3-1b-it": 999_885_952,
}


def real(data_dir, name: str) -> tuple[Family, ModelConfig]:
    fields = json.loads((data_dir / "configs" / f"{name}.config.json").read_text())
    family = family_of(fields)
    return family, family.config(fields)


def test_real_configs(data_dir):
    """Each gives the published number of parameters."""
    files = sorted((data_dir / "configs").glob("*.config.json"))
    assert [file.name.removesuffix(".config.json") for file in files] == sorted(PARAMETERS)
    for name, count in PARAMETERS.items():
        family, config = real(data_dir, name)
        arrays = flatten(model.abstract_params(config))
        assert sum(array.size for array in arrays.values()) == count, name
        shapes = {path: native_shape(parts) for path, parts in family.table(config).items()}
        assert shapes == {path: array.shape for path, array in arrays.items()}, name
        assert family.config(family.write(config)) == config, name


@pytest.mark.parametrize("name", PARAMETERS)
def test_hf_reads_what_is_exported_without_a_warning(data_dir, name, hf_silent):
    """transformers warns of some of the real files, or no longer reads them."""
    fields = json.loads((data_dir / "configs" / f"{name}.config.json").read_text())
    family, config = real(data_dir, name)
    renewed = family.renew(fields, config)
    assert family.config(renewed) == config
    for exported in (renewed, family.write(config)):
        special = {"pad_token_id": fields.get("pad_token_id"), "eos_token_id": None}
        with hf_silent():
            transformers.CONFIG_MAPPING[family.model_type].from_dict(exported | special)


def test_what_real_configs_switch_on(data_dir):
    _, phi = real(data_dir, "Phi-3-mini-4k-instruct")
    assert phi.sliding_window == (2047,) * 32 and phi.rope == RopeConfig()
    _, phi = real(data_dir, "mlc_Phi-4-mini-instruct")
    assert phi.rope.type == "longrope" and phi.rope.rotary_fraction == 0.75
    assert phi.rope.attention_factor == pytest.approx(1.1902380714)  # sqrt(1 + ln 32 / ln 4096)
    _, su = real(data_dir, "Phi-3-vision-128k_text_su_rope")
    assert su.rope.type == "longrope" and len(su.rope.long_factors) == 48
    _, qwen = real(data_dir, "mlc_Qwen2-0.5B")  # names a window, which is off
    assert qwen.sliding_window is None and qwen.qkv_bias and not qwen.attention_out_bias
    _, mistral = real(data_dir, "mlc_Mistral-7B-v0.1")
    assert mistral.sliding_window == (4096,) * 32
    _, gemma = real(data_dir, "mlc_gemma-2b")
    assert gemma.tie_embeddings and gemma.activation == "gelu_tanh"
    _, gemma = real(data_dir, "mlc_gemma-3-1b-it")
    assert gemma.sliding_window == ((512,) * 5 + (None,)) * 4 + (512,) * 2
    assert (gemma.rope.theta, gemma.local_rope.theta) == (1e6, 1e4)


@pytest.mark.parametrize(
    "index, name",
    [
        ("Llama-2-7b-chat-hf.pytorch_model.bin.index", "Llama-2-7b-chat-hf"),
        ("Phi-3-mini-4k-derived-merge.model.safetensors.index", "Phi-3-mini-4k-instruct"),
    ],
)
def test_real_tensor_names(data_dir, index, name):
    names = json.loads((data_dir / "weight_index" / f"{index}.json").read_text())["weight_map"]
    family, config = real(data_dir, name)
    assert {p.name for parts in family.table(config).values() for p in parts} == names.keys()


# --- fields ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_fields_have_the_defaults_of_hf(name):
    """Only the sizes must be there; transformers fills in the same values as we do."""
    needed = {k: v for k, v in SIZES.items() if k not in ("max_position_embeddings", "head_dim")}
    del needed["num_key_value_heads"]
    needed |= dict(hidden_size=128, num_attention_heads=32)
    family = FAMILIES[name]
    filled = transformers.CONFIG_MAPPING[name](**needed).to_dict()
    del filled["architectures"]
    assert family.config(needed) == family.config(filled)


@pytest.mark.parametrize("name", FAMILIES)
def test_both_spellings_of_rope_are_the_same(name):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 64}
    kind = {"type": "llama3", **scaling}
    if name == "phi3":
        factors = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
        kind = {"type": "su", **factors, "original_max_position_embeddings": 4096}
    old = read(name, rope_theta=5e5, rope_scaling=kind)
    new = {"rope_type": kind["type"], "rope_theta": 5e5, **kind}
    if name == "gemma3_text":
        new = {"full_attention": new, "sliding_attention": {"rope_type": "default"}}
    assert read(name, rope_parameters=new) == old
    assert old.rope.theta == 5e5 and old.rope.type in ("llama3", "longrope")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_names_what_it_does_not_know(name):
    assert "rope type 'ntk'" in refused(name, rope_scaling={"rope_type": "ntk", "factor": 2.0})
    assert "'relu'" in refused(name, hidden_act="relu")
    assert "colour = 'red'" in refused(name, colour="red")
    assert "architectures is ['OtherModel']" in refused(name, architectures=["OtherModel"])


@pytest.mark.parametrize(
    "model_type, fields, message",
    [
        ("mixtral", {"num_local_experts": 8}, "'mixtral' is a mixture of experts (num_local_ex"),
        ("qwen3_moe", {}, "'qwen3_moe' is a mixture of experts"),
        ("granite", {"num_experts_per_tok": 2}, "mixture of experts (num_experts_per_tok)"),
        ("gemma3n", {}, "'gemma3n' is not supported; supported are"),
        (["llama"], {}, "['llama'] is not supported"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is unknown"),
        ("qwen2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotates whole heads"),
        ("mistral", {"sliding_window": 8, "sliding_window_size": 9}, "sliding_window is 8, and"),
        ("phi3", {"mlp_bias": True}, "mlp_bias is True"),
        ("phi3", {"rope_scaling": {"type": "su"}}, "needs 6 of each"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": 2}}, "must be a list of numbers"),
        ("phi3", {"rope_scaling": {"type": "su", "long_factor": [0]}}, "long_factor must be a num"),
        ("qwen2", {"layer_types": ["full_attention"]}, "has 1 entries, the model 4 layers"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "there is no sliding window"),
        ("qwen3", {"layer_types": ["linear_attention"] * 4}, "layer_types must list"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping must be a number above"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "only decoders"),
        ("gemma3_text", {"rope_parameters": {"x": {}}}, "rope_parameters: fields that are not und"),
        ("granite", {"residual_multiplier": "x"}, "residual_multiplier must be a number"),
        ("smollm3", {"no_rope_layers": [1, 2, 1, 0]}, "no_rope_layers must list 0 or 1"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries"),
    ],
)
def test_refused(model_type, fields, message):
    assert message in refused(model_type, **fields)


LLAMA_1 = {"architectures": ["LLaMAForCausalLM"], "max_sequence_length": 2048, "pad_token_id": -1}
IF_OFF = {"is_decoder", "is_encoder_decoder", "add_cross_attention", "per_layer_config"}
INERT = {  # what transformers and its kin write without any effect on logits
    "_flash_attn_2_enabled": True,
    "_model_name_or_path": "owner/name",
    "_commit_hash": "0123",
    "_attn_implementation_internal": "sdpa",
    "unk_token_id": 0,
    "mask_token_id": None,
    "quantization_config": None,
    "pruned_heads": {},
    "per_layer_config": {},
    "id2label": {"0": "LABEL_0"},
    "num_labels": 2,
    "classifier_dropout": 0.1,
    "gradient_checkpointing": False,
    "xla_device": None,
    "loss_type": "ForCausalLM",
    "min_p": 0.1,
    "max_new_tokens": 20,
    "guidance_scale": 1.0,
    "output_logits": True,
    "cache_config": {"batch_size": 1},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_inert_fields_change_nothing(name):
    assert read(name, **INERT) == read(name)
    fields = transformers.GenerationConfig().to_dict() | transformers.PretrainedConfig().to_dict()
    known = {"architectures", "model_type", "transformers_version"}
    assert read(name, **{field: 1 for field in fields.keys() - known - IF_OFF}) == read(name)
    for field in IF_OFF & fields.keys() | {"quantization_config"}:
        assert f"{field} = {{'a': 1}}" in refused(name, **{field: {"a": 1}})


def test_the_config_of_llama_1():
    assert read("llama", **LLAMA_1) == read("llama")
    without = {k: v for k, v in SIZES.items() if k != "max_position_embeddings"}
    assert FAMILIES["llama"].config(without | LLAMA_1).max_position_embeddings == 2048


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_yarn_and_llama3_start_from_the_whole_context_if_nothing_is_said(name):
    """As `standardize_rope_params` of transformers."""
    for scaling in (
        {"rope_type": "yarn", "factor": 4.0},
        {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ):
        config = read(name, rope_scaling=scaling)
        kind = scaling.get("type") or scaling["rope_type"]
        sizes = SIZES | {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4} | scaling}
        theirs = transformers.CONFIG_MAPPING[name](**sizes).rope_parameters
        ours = config.rope.original_max_position_embeddings
        assert ours == config.max_position_embeddings == theirs["original_max_position_embeddings"]


def test_fields_that_the_user_passes():
    fields = SIZES | {"model_type": "llama", "colour": "red"}
    family = FAMILIES["llama"]
    assert family.config(fields, ["colour"]) == read("llama")
    yarn = {"rope_type": "yarn", "factor": 4.0, "finetuned": True}
    assert family.config(fields | {"rope_scaling": yarn}, ["colour", "finetuned"]).rope.factor == 4
    with pytest.raises(ConfigError, match=r"finetuned = True.*--ignore-field NAME"):
        family.config(fields | {"rope_scaling": yarn}, ["colour"])
    for name in ("hidden_size", "rope_theta", "shape", "unk_token_id"):  # known, or not there
        with pytest.raises(ConfigError, match=f"--ignore-field {name}: there is no such field"):
            family.config(fields | {"unk_token_id": 0}, ["colour", name])


def test_null_is_not_the_default():
    """Mistral from v0.2 on says null and has no window; a file without the field has one."""
    assert read("mistral").sliding_window == (4096,) * 4
    assert read("mistral", sliding_window=None).sliding_window is None
    assert read("gemma2").logit_softcap == 30
    assert read("gemma2", final_logit_softcapping=None).logit_softcap is None


def test_attention_factors_of_yarn():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

    def factor(**given) -> float:
        return read("qwen2", rope_scaling=yarn | given).rope.attention_factor

    assert factor() == pytest.approx(1.1386294)  # 1 + 0.1 ln 4
    assert factor(mscale=2.0) == factor()  # has an effect only together with mscale_all_dim
    assert factor(mscale=2.0, mscale_all_dim=0.5) == pytest.approx(1.2772589 / 1.0693147)
    assert factor(attention_factor=1.5) == 1.5
    assert "truncate is False" in refused("qwen2", rope_scaling=yarn | {"truncate": False})


def test_layers_of_each_kind():
    window = {"sliding_window": 8}
    assert read("gemma2", **window).sliding_window == (8, None, 8, None)
    gemma3 = read("gemma3_text", **window, sliding_window_pattern=2)
    assert gemma3.sliding_window == (8, None, 8, None)
    qwen = dict(**window, use_sliding_window=True, max_window_layers=3)
    assert read("qwen2", **qwen).sliding_window == (None, None, None, 8)
    smollm = read("smollm3", **window, use_sliding_window=True)
    assert smollm.rope_layers == (True, True, True, False)
    assert smollm.sliding_window == (None, None, None, 8)
    assert read("smollm3", no_rope_layers=[1] * 4).rope_layers is None


# --- Gemma 3 with images --------------------------------------------------------------------------

# text_config of the published files, which leave out 4B's sizes: these are HF's defaults.
GEMMA3 = {
    3_880_263_168: dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34),
    11_766_034_176: dict(
        hidden_size=3840,
        intermediate_size=15360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
    ),
    27_009_346_304: dict(
        hidden_size=5376,
        intermediate_size=21504,
        num_hidden_layers=62,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=168,
    ),
}


def multimodal(text: dict, **fields) -> dict:
    text = text | {
        "model_type": "gemma3_text",
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    } | fields


@pytest.mark.parametrize("count", GEMMA3)
def test_the_text_models_of_gemma3(count):
    """4B, for example, has 4,300,079,472 parameters, of which 419,816,304 are for images."""
    fields = multimodal(GEMMA3[count])
    family = family_of(fields)
    config = family.config(fields)
    assert model.num_params(config) == count
    assert config.sliding_window[:7] == (1024,) * 5 + (None, 1024)
    assert (config.rope.type, config.rope.factor, config.rope.theta) == ("linear", 8.0, 1e6)
    text = FAMILIES["gemma3_text"]
    assert config == text.config(text.write(config))
    # Both spellings, and the one that is assumed when no tensors are known.
    published, modules = (
        f"{p}layers.0.mlp.up_proj.weight" for p in (n.model for n in family.names)
    )
    assert published == "language_model.model.layers.0.mlp.up_proj.weight"
    for name, tensors in (
        (published, ()),
        (published, ["language_model.model.embed_tokens.weight"]),
        (modules, ["model.language_model.embed_tokens.weight"]),
    ):
        table = family.table(config, tensors)
        assert table["layers_0/mlp/gate_up/weight"][1].name == name


@pytest.mark.parametrize(
    "text, fields, message",
    [
        ({}, {"text_config": {}}, "config.json: text_config: hidden_size is missing"),
        ({}, {"text_config": None}, "config.json: text_config: hidden_size is missing"),
        ({}, {"text_config": []}, "text_config must be an object"),
        ({}, {"tie_word_embeddings": False}, "tie_word_embeddings is another one in text_config"),
        ({"tie_word_embeddings": False}, {}, "tie_word_embeddings is another one in text_config"),
        ({"colour": "red"}, {}, "config.json: text_config: fields that are not understood"),
        ({}, {"colour": "red"}, "colour = 'red'"),
        ({}, {"architectures": ["Gemma3ForCausalLM"]}, "is 'Gemma3ForConditionalGeneration'"),
        ({"num_local_experts": 8}, {}, "num_local_experts = 8"),
    ],
)
def test_what_is_refused_of_a_multimodal_gemma3(text, fields, message):
    fields = multimodal(next(iter(GEMMA3.values())) | text, **fields)
    with pytest.raises(ConfigError) as caught:
        family_of(fields).config(fields)
    assert message in str(caught.value)


def test_only_gemma3_may_be_inside_gemma3():
    fields = multimodal(next(iter(GEMMA3.values())))
    fields["text_config"] |= {"model_type": "gemma2"}
    with pytest.raises(ConfigError, match="text_config: model_type is 'gemma2', and only 'gemma3_"):
        family_of(fields).config(fields)


# --- damaged configs ------------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 10**400, "", "linear", "float16", "full_attention"])
    | st.text(max_size=3),
    lambda some: (
        st.lists(some, max_size=3)
        | st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "a"]), some, max_size=3)
    ),
    max_leaves=4,
)


def test_any_change_of_a_real_config_gives_a_model_or_a_clear_error(data_dir):
    paths = sorted((data_dir / "configs").glob("*.json"))
    configs = [json.loads(path.read_text()) for path in paths]
    names = sorted({name for config in configs for name in config})
    understood = set()

    @settings(derandomize=True, max_examples=200, deadline=None, database=None)
    @given(st.data())
    def check(data):
        fields = copy.deepcopy(data.draw(st.sampled_from(configs)))
        if data.draw(st.booleans()):
            fields["model_type"] = data.draw(st.sampled_from(sorted(FAMILIES)))
        for name in data.draw(st.lists(st.sampled_from(names), max_size=2)):
            nested = fields.get(name)
            if isinstance(nested, dict) and nested:
                nested[data.draw(st.sampled_from(sorted(nested)))] = data.draw(ANYTHING)
            else:
                fields[name] = data.draw(ANYTHING)
        try:
            config = family_of(fields).config(fields)
        except ConfigError as error:
            understood.add(False)
            assert str(error)
        else:
            understood.add(True)
            assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    check()
    assert understood == {True, False}
