"""LM: a model with its tokenizer and draft, ready to generate, stream and chat."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from jax.sharding import Mesh

from s3d_jax.conversation import Conversation
from s3d_jax.drafters.base import SecondModel, Target
from s3d_jax.drafters.stored import (
    KINDS,
    S3D,
    StoredFeatures,
    choose_draft,
    draft_kind,
    draft_names,
    is_merged,
    merge_deltas,
    read_draft,
)
from s3d_jax.engine.batch import Batch
from s3d_jax.engine.costs import Experiences
from s3d_jax.engine.options import GenerateOptions, checked_ids
from s3d_jax.engine.programs import Programs
from s3d_jax.engine.prompts import Message, Prompt
from s3d_jax.engine.queue import Queue
from s3d_jax.engine.results import Result
from s3d_jax.engine.runner import UNLIMITED, Engine
from s3d_jax.errors import CheckpointError, ConfigError, InputError
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.mesh import mesh_of
from s3d_jax.nn.draft import DraftParams, untrained_draft, with_head
from s3d_jax.nn.features import FeatureDraft
from s3d_jax.nn.sharding import build_mesh, place_draft
from s3d_jax.settings.drafting import DraftConfig, FeatureConfig, Tuning, symmetric_skip
from s3d_jax.settings.model import ModelConfig, check_kv_cache
from s3d_jax.settings.records import is_integer, plain
from s3d_jax.storage import native as checkpoint
from s3d_jax.storage.tokenizer import has_vocabulary, read_tokenizer
from s3d_jax.storage.tuning import read_tuning
from s3d_jax.stream import Stream, text_pieces
from s3d_jax.weights.trees import Params

EMBEDDED = Path(__file__).parent / "assets" / "stories_and_dialogues"


def default_draft(config: ModelConfig) -> DraftConfig:
    """The draft of a model without a trained one: the middle half is skipped, γ = 4."""
    return DraftConfig(skip=symmetric_skip(config.num_layers, config.num_layers // 2), gamma=4)


@under_usual_jax_settings
def load(
    path: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    draft: str | None = None,
    use_draft: bool = True,
    draft_model: "str | os.PathLike[str] | LM | None" = None,
    max_length: int | None = None,
    mesh: Any = None,
    kv_cache: str | None = None,
    progress: bool = False,
) -> "LM":
    """Loads a native checkpoint onto the default device; without a path the embedded model.

    Only the end-of-text ids are taken from HF's generation_config.json: the caller chooses the
    sampling, and the default is greedy. `s3d info` lists what was not used. γ and skip are what
    `s3d tune` chose for this device, if it was run, and else, or on a mesh, the draft's own.

    Args:
        path: the checkpoint folder, as `s3d-convert` writes it. None is the small model that comes
            with the package, which writes stories and answers as a booking assistant.
        dtype: "float32", "bfloat16" or "float16" to cast the weights to; None keeps what is stored.
            Of an int8 checkpoint it is the type of all that is not int8.
        draft: which of the checkpoint's trained drafts; None takes the one that `s3d tune --drafts`
            preferred on this device, else the one called "default", or the only one. One of the
            kind "eagle" or "medusa" is the one that the method of this name uses. A checkpoint
            without any drafts untrained. Where the layers that it changes have at most 64 MiB, they
            are copied and changed once (`merge_deltas`), unless the draft is of the mode "merged".
        use_draft: False leaves the trained drafts alone.
        draft_model: a second, smaller model of the same vocabulary, for the method "two-model": its
            checkpoint folder, loaded with `dtype`, or an LM.
        max_length: tokens (prompt and output) that a row may have; None takes the length the model
            was made for. Each batch allocates only what it needs of it.
        mesh: several devices: "model=4" or "data=2,model=2", a mapping of these axes to numbers, or
            a jax Mesh of them. Matrices, heads and the cache are divided over `model`, the rows of
            batches over `data`. See docs/sharding.md.
        kv_cache: "int8" holds the keys and values of texts in int8, with a scale for each token and
            key head: 53 % of the memory of 16 bits where heads have 64 numbers, 27 % of float32's.
            None holds them in `dtype`. It becomes `config.kv_cache`, and that of a `draft_model`
            which is loaded here.
        progress: show a bar on a terminal where it takes more than a second.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged or of another format. For a HF
            folder the message says how to convert it. Or its tuning.json is damaged.
        ConfigError: `draft_model` has another vocabulary; the mesh is none, or does not divide the
            model; or `kv_cache` is unknown.
        DeviceError: there is no device to load it onto, it has too little memory, or the mesh needs
            more than there are.

    Warns:
        UserWarning: the device has no fast bfloat16, and the weights are of that type; jax computes
            on the CPU next to a GPU, or shares a GPU with torch; the tokenizer cannot be read, and
            the model goes without; or `max_length` is more than the model was made for.
    """
    if path is None:
        path = EMBEDDED
    # First, since a wrong name should not cost the time of loading.
    check_kv_cache(kv_cache)
    chosen: dict[str, str] = {}
    if draft is not None and use_draft and draft in draft_names(path):
        chosen = {draft_kind(path, draft): draft}
    others = chosen.keys() & KINDS.keys() - {S3D}
    name = None
    if use_draft:
        # What one device prefers says little of several.
        computing = None if mesh is not None else _computing(path, dtype, kv_cache)
        try:
            name = choose_draft(path, None if others else draft, config=computing)
        except CheckpointError:
            if not others:  # else S3D's, which was not asked for, is the untrained one
                raise
    devices = None if mesh is None else build_mesh(mesh)
    loaded = checkpoint.load(path, dtype, mesh=devices, progress=progress)
    if draft_model is not None and not isinstance(draft_model, LM):
        draft_model = load(
            draft_model,
            dtype=dtype,
            use_draft=False,
            mesh=devices,
            kv_cache=kv_cache,
            progress=progress,
        )
    config = loaded.config.replace(kv_cache=kv_cache)
    lm = LM(
        config,
        loaded.params,
        **_draft(path, config, loaded.params, name, devices),
        tokenizer=tokenizer_or_none(loaded.header.path),
        eos_token_ids=loaded.header.eos_token_ids,
        max_length=max_length,
        draft_model=draft_model,
        feature_drafts=StoredFeatures(path, config, loaded.params, chosen) if use_draft else None,
    )
    # Dynamic rotary embeddings grow with the text: they are made to continue.
    if lm.max_length > config.max_position_embeddings and config.rope.type != "dynamic":
        warnings.warn(
            f"max_length (--max-length) is {lm.max_length}, and the model was made for "
            f"{config.max_position_embeddings} tokens: beyond these its text may make no sense, so "
            "give fewer",
            stacklevel=3,
        )
    return lm


def _computing(
    path: "str | os.PathLike[str]", dtype: str | None, kv_cache: str | None
) -> ModelConfig | None:
    """The settings that a checkpoint will compute with; None where loading will refuse it."""
    try:
        config = checkpoint.read_header(path).config
        return config.replace(kv_cache=kv_cache, dtype=dtype or config.dtype)
    except (CheckpointError, ConfigError):
        return None


def with_draft(lm: "LM", path: "str | os.PathLike[str]", name: str) -> "LM":
    """The same model with another draft of its checkpoint; they share the target's arrays.

    Args:
        lm: from `load`, on one device.
        path: the checkpoint folder that it was loaded from.
        name: of the draft. One of the kind "eagle" or "medusa" is for the method of this name, and
            leaves S3D's draft as it is.

    Raises:
        CheckpointError: there is no such draft, it is damaged, or of an unknown kind.
    """
    kind = draft_kind(path, name)
    reads_hidden = kind in KINDS.keys() - {S3D}
    features = StoredFeatures(path, lm.config, lm.params, {kind: name} if reads_hidden else {})
    if reads_hidden:
        features[kind]  # now, since a damaged one should be found before it is needed
        own: dict[str, Any] = dict(
            draft_config=lm.draft_config,
            draft_params=lm.draft_params,
            draft_name=lm.draft_name,
            tuning=lm.tuning,
        )
    else:
        own = _draft(path, lm.config, lm.params, name, None)
    return LM(
        lm.config,
        lm.params,
        **own,
        tokenizer=lm.tokenizer,
        eos_token_ids=lm.eos_token_ids,
        max_length=lm.max_length,
        draft_model=lm.draft_model,
        feature_drafts=features,
    )


def _draft(
    path: "str | os.PathLike[str]",
    config: ModelConfig,
    params: Params,
    name: str | None,
    mesh: Mesh | None,
) -> dict[str, Any]:
    """What an LM takes of a draft of its checkpoint; None is the untrained one."""
    found: dict[str, Any] = {"draft_name": name}
    if mesh is None:  # what one device gains says little of several
        found["tuning"] = read_tuning(path, config, name)
    if name is None:
        return found
    trained = read_draft(path, name, config, mesh=mesh)
    arrays = trained.params
    if is_merged(config, params, trained.config, arrays):
        arrays = merge_deltas(config, params, arrays)
    return found | {"draft_config": trained.config, "draft_params": arrays}


def tokenizer_or_none(folder: Path) -> Any:
    """The tokenizer; None if there is none, or after a warning: token ids work without one."""
    if not has_vocabulary(folder):
        return None
    try:
        return read_tokenizer(folder)
    except InputError as error:
        warnings.warn(f"{error}; the model takes and gives ids only (--ids)", stacklevel=3)
        return None


class LM:
    """A model ready to generate. Make one with `load`, or from arrays.

    Attributes:
        config, params: the target model.
        draft_config, draft_params: the draft; γ and skip may be overridden per call. A model
            without a trained draft has the untrained one: always exact, seldom accepted.
        draft_name: of the checkpoint's draft that this is, or None.
        tokenizer: a transformers tokenizer, or None (then only ids go in and come out).
        eos_token_ids: tokens that end a text.
        max_length: tokens (prompt and output) that a row may have at most.
        feature_drafts: by kind ("eagle", "medusa"), settings and arrays of drafts that read hidden
            states (`nn.features.in_memory`); the methods of these names use them.
        draft_model: the second model of the method "two-model", or None. May be set later.
        tuning: γ and skip that `s3d tune` chose, used instead of the draft's; None without tuning.
        programs: the compiled programs that are kept (see `keep_programs`).
        experiences: what drafting has cost and gained, by which texts draft or not.

    Raises:
        InputError: eos_token_ids are no list of ids of the vocabulary.
        ConfigError: max_length is below 2, the draft or the tuning is of another number of layers,
            or the second model has another vocabulary.
    """

    @under_usual_jax_settings
    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        draft_config: DraftConfig | None = None,
        draft_params: DraftParams | None = None,
        draft_name: str | None = None,
        tokenizer: Any = None,
        eos_token_ids: Sequence[int] = (),
        max_length: int | None = None,
        draft_model: "LM | None" = None,
        feature_drafts: Mapping[str, tuple[FeatureConfig, FeatureDraft]] | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        self.config = config
        self.params = params
        self.draft_config = draft_config or default_draft(config)
        self.draft_config.validate_for(config)
        if draft_params is None:
            draft_params = untrained_draft(config, params)
        self.draft_params = draft_params
        self.draft_name = draft_name
        self.tokenizer = tokenizer
        self.eos_token_ids = checked_ids(eos_token_ids, config.vocab_size)
        length = plain(config.max_position_embeddings if max_length is None else max_length)
        if not is_integer(length) or length < 2:
            raise ConfigError(f"max_length must be an integer >= 2, got {max_length!r}")
        self.max_length: int = length
        self.feature_drafts = {} if feature_drafts is None else feature_drafts
        self.draft_model = draft_model
        if tuning is not None:
            DraftConfig(tuning.skip).validate_for(config)
        self.tuning = tuning
        self.programs = Programs()
        self.experiences = Experiences()

    @property
    def draft_params(self) -> DraftParams:
        """S3D's draft; setting one takes its rows of the head of `params`."""
        return self._draft_params

    @draft_params.setter
    @under_usual_jax_settings
    def draft_params(self, draft: DraftParams) -> None:
        mesh = mesh_of(self.params)
        placed = place_draft(mesh, self.config, draft.replace(head=()))
        with_rows = with_head(self.config, self.params, placed)
        self._draft_params = place_draft(mesh, self.config, with_rows)

    @property
    def draft_model(self) -> "LM | None":
        """The second model; another vocabulary or mesh is a ConfigError, no LM an InputError."""
        return self._draft_model

    @draft_model.setter
    def draft_model(self, model: "LM | None") -> None:
        if model is not None:
            if not isinstance(model, LM):
                raise InputError(
                    f"draft_model is an LM (s3d_jax.load makes one), got {model!r:.80}"
                )
            _check_same_vocabulary(self, model)
            if mesh_of(model.params) != mesh_of(self.params):
                raise ConfigError(
                    "the draft model lies on other devices than the model: load both with the "
                    "same mesh"
                )
        self._draft_model = model

    @property
    def target(self) -> Target:
        """The model as drafters and batches see it, with the attributes as they are now."""
        second = self.draft_model
        return Target(
            config=self.config,
            params=self.params,
            max_length=self.max_length,
            eos_token_ids=self.eos_token_ids,
            draft_config=self.draft_config,
            draft_params=self.draft_params,
            feature_drafts=self.feature_drafts,
            draft_model=None if second is None else SecondModel(second.config, second.params),
            tuning=self.tuning,
        )

    @property
    def engine(self) -> Engine:
        """What runs batches of this model."""
        return Engine(self.target, self.tokenizer, self.programs, self.experiences)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        progress: Callable[[int], None] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Result]:
        """Continues one or many prompts, all in one batch.

        The output does not depend on the method, γ or skip: under greedy decoding it is token for
        token the output of plain decoding, sampled with the same seed it is too.

        Args:
            prompts: a text, a list of token ids, or a list of either. Lengths may differ.
            progress: called now and then with the number of new tokens so far, all rows together.
            **options: see GenerateOptions (max_new_tokens, method, gamma, temperature, stop, seed,
                ...).

        Returns:
            One Result per prompt, in order (a list also for a single prompt). A row whose logits
            become NaN or infinite, as in float16, ends there, with finish_reason "error" and an
            `error` that says what to do; the other rows continue.

        Raises:
            InputError: a prompt that is empty, too long, or holds ids outside the vocabulary, ...
            ConfigError: an option that is unknown or out of range.
        """
        engine = self.engine
        batch = Batch(engine, engine.encoder.encode(prompts), **options)
        for _ in batch.run(UNLIMITED if progress is None else 16):
            if progress:
                progress(sum(len(tokens) for tokens in batch.tokens))
        return batch.results()

    def generate_many(
        self, prompts: Iterable[Prompt], *, rows: int = 16, **options: Unpack[GenerateOptions]
    ) -> Iterator[tuple[int, Result]]:
        """Continues many prompts, some of them at once; a finished one makes room for the next.

        So no prompt waits for the longest continuation, as it does in `generate`. The outcome of
        each prompt is that of `generate`.

        Args:
            prompts: texts or lists of token ids. All rows have room for the longest of them.
            rows: prompts that run at once.
            **options: as in `generate`; a list holds one entry per prompt.

        Returns:
            An iterator over (number of the prompt, its Result), in the order in which they finish.

        Raises:
            InputError, ConfigError: as in `generate`, before the first prompt is run.
        """
        engine = self.engine
        return Queue(engine, engine.encoder.encode(prompts), rows, **options).run()

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream[str]:
        """Continues one prompt; yields pieces of text as soon as they are certain.

        Args:
            prompt: a text or a list of token ids.
            **options: as in `generate`.

        Returns:
            An iterator of strings, which together are the text. When it has ended, its `result` is
            what `generate` would have returned.
        """
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer: use stream_tokens, which yields ids")
        batch = self._single(prompt, options)
        return Stream(text_pieces(batch), batch)

    def stream_tokens(
        self, prompt: Prompt, **options: Unpack[GenerateOptions]
    ) -> Stream[list[int]]:
        """As `stream`, but yields the new ids of each iteration, 1 to γ+1 of them."""
        batch = self._single(prompt, options)
        return Stream((rows[0] for rows in batch.run(1) if rows[0]), batch)

    def chat(self, messages: Sequence[Message], **options: Unpack[GenerateOptions]) -> Result:
        """Answers a conversation.

        Args:
            messages: {"role": ..., "content": ...} each, the last one the user's.
            **options: as in `generate`; eos_token_ids are `chat_eos_token_ids` by default.
        """
        prompt = self.chat_prompt(messages)
        if options.get("eos_token_ids") is None:
            options["eos_token_ids"] = self.chat_eos_token_ids
        return self.generate([prompt], **options)[0]

    def conversation(
        self, system: str | None = None, **options: Unpack[GenerateOptions]
    ) -> Conversation:
        """Begins a conversation, which keeps its cache from turn to turn.

        Args:
            system: a message to begin with.
            **options: as in `chat`, for all answers.
        """
        return Conversation(self, system, **options)

    @property
    def chat_eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: end-of-text tokens, and the template's end of a turn."""
        return self.engine.encoder.chat_eos_token_ids

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, formatted by the tokenizer's template up to the answer.

        Raises:
            InputError: no tokenizer, no chat template, no list of messages, or messages that the
                template refuses.
        """
        return self.engine.encoder.encode_chat(messages)

    def token_ids(self, prompts: Prompt | Iterable[Prompt]) -> list[np.ndarray]:
        """One or many prompts as checked arrays of ids, int32 [n] each.

        Raises:
            InputError: see `generate`.
        """
        return self.engine.encoder.encode(prompts)

    def _single(self, prompt: Prompt, options: GenerateOptions) -> Batch:
        rows = self.token_ids(prompt)
        if len(rows) != 1:
            raise InputError(
                f"a stream takes one prompt, got {len(rows)}: use generate for a batch"
            )
        return Batch(self.engine, rows, **options)


def _check_same_vocabulary(lm: LM, other: LM) -> None:
    """A draft token must mean the same to both."""
    sizes = lm.config.vocab_size, other.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"the draft model has a vocabulary of {sizes[1]} tokens, the model one of {sizes[0]}: "
            "take one that was trained with the same tokenizer"
        )
    if lm.tokenizer is None or other.tokenizer is None:
        return
    ours, theirs = lm.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if ours != theirs:
        different = sorted(dict(ours.items() ^ theirs.items()))[:3]
        raise ConfigError(
            f"the draft model's tokenizer is another one (it differs in {different}): take a model "
            "that was trained with the same tokenizer"
        )
