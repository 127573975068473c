"""Plain language-model training of a small model from nothing, with its tokenizer."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from s3d_jax.config import DraftConfig, ModelConfig
from s3d_jax.errors import InputError
from s3d_jax.model import Params, init_params
from s3d_jax.train.draft import AdapterConfig, draft_losses, init_draft
from s3d_jax.train.objective import Mean, ObjectiveConfig, next_token_loss, target_stream

END = "<|endoftext|>"  # begins and ends every text
USER, ASSISTANT, END_OF_TURN = "<|user|>", "<|assistant|>", "<|end|>"

# In the manner of Phi-3's. "system" turns are the user's as far as this small template goes.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}"
    "{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: str | os.PathLike[str]) -> None:
    """Trains a byte-level BPE tokenizer, and writes its files for transformers.

    Args:
        texts: what it is trained on.
        vocab_size: V, with 256 bytes and four special tokens.
        out: a folder that exists.

    Raises:
        InputError: a vocabulary too small for the bytes, or texts that give too few merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END, USER, ASSISTANT, END_OF_TURN]
    if vocab_size < 256 + len(special):
        raise InputError(f"vocab_size must be at least {256 + len(special)}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise InputError(
            f"the texts give a vocabulary of {tokenizer.get_vocab_size()} only, not {vocab_size}"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        additional_special_tokens=special[1:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)


def text_of_files(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """The words of .txt and .jsonl files, for the tokenizer to be trained on."""
    import json

    from s3d_jax.train.data import SEPARATOR, read_text

    for path in map(Path, paths):
        text = read_text(path)
        if not path.name.removesuffix(".gz").endswith(".jsonl"):
            yield from text.split(SEPARATOR)
            continue
        for line in text.splitlines():
            fields = json.loads(line)
            if "text" in fields:
                yield fields["text"]
            yield from (message["content"] for message in fields.get("messages", ()))


class PretrainTask:
    """What `fit` needs to know to train a model from nothing.

    The trained tree is {"params": the model's}, with {"draft": DraftParams} where the model learns
    to draft along the way.

    Attributes:
        frozen: nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        draft_config: DraftConfig | None = None,
        draft_weight: float = 0.0,
        objective: ObjectiveConfig = ObjectiveConfig(),
        adapter: AdapterConfig = AdapterConfig(),
        remat: bool = False,
    ) -> None:
        self.frozen: Params = {}
        self.config = config
        self.draft_config = draft_config
        self.loss_weights = {"next_token_loss": 1.0}
        if draft_config is not None:
            self.loss_weights["draft_loss"] = draft_weight
        self.objective = objective
        self.adapter = adapter
        self.remat = remat

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random weights, N(0, 0.02²); those that end a residual branch smaller by √(2L)."""
        key, draft_key = jax.random.split(key)
        params: Any = init_params(self.config.replace(dtype="float32"), key)
        shrink = (2 * self.config.num_layers) ** -0.5
        for i in range(self.config.num_layers):
            layer = params[f"layers_{i}"]
            for part, name in (("attention", "out"), ("mlp", "down")):
                layer[part][name]["weight"] = layer[part][name]["weight"] * shrink
        tree = {"params": params}
        if self.draft_config is not None:
            tree["draft"] = init_draft(
                self.config, params, self.draft_config, self.adapter, draft_key
            )
        return tree

    def losses(
        self, tree: Mapping[str, Any], frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> dict[str, Mean]:
        """As `DraftTask.losses`."""
        tokens, learn = batch["tokens"], batch["learn"]
        if self.draft_config is None:
            logits, _ = target_stream(
                self.config, tree["params"], tokens, tokens.shape[1], remat=self.remat
            )
            assert logits is not None
            return {"next_token_loss": next_token_loss(logits, tokens, learn)}
        return draft_losses(
            *(self.config, tree["params"], self.draft_config, tree["draft"]),
            *(self.objective, batch, key),
            target_is_trained=True,
            remat=self.remat,
        )
