"""The tokenizer of a GGUF file, as HF's tokenizer.json.

A file names how its text is cut before merges only by a word, `pre`. Its meaning is the
pre-tokenizer of the models that carry it, as their tokenizer.json has it.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from convert.sources.gguf.metadata import Metadata
from s3d_jax.errors import ConversionError
from s3d_jax.storage.json_files import write_json
from s3d_jax.storage.native import CheckpointWriter
from s3d_jax.storage.tokenizer import TEMPLATES

# Kinds of tokens, as sentencepiece numbers them.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_PLAIN = ("<unk>", "<s>", "<|endoftext|>")  # tokens of Phi 3 that swallow no spaces

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _REST
_QWEN2 = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|" + _REST
)


@dataclasses.dataclass(frozen=True)
class _Pre:
    """How a text is cut before merges.

    Attributes:
        pattern: a regular expression of the pieces; "" is GPT-2's, which tokenizers has built in.
        single_digits: whether each digit is a piece.
        nfc: whether the text is normalised first.
        ignore_merges: whether a piece that is a token needs no merges.
        begins: whether a text begins with the bos token if the file does not say.
    """

    pattern: str = ""
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    begins: bool = False


_GPT2, _DIGITS = _Pre(), _Pre(single_digits=True)
_LLAMA3 = _Pre(_CL100K, ignore_merges=True, begins=True)
_PRES = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "dbrx": _Pre(_CL100K),
    "smaug-bpe": _Pre(_CL100K),
    "qwen2": _Pre(_QWEN2, nfc=True),
    "gpt-4o": _Pre(_O200K),
}


@dataclasses.dataclass(frozen=True)
class GgufTokenizer:
    """The tokenizer in a GGUF file.

    Attributes:
        path: the file.
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece).
        pre: how the text is cut before merges; None for SentencePiece.
        tokens, kinds, scores, merges: the vocabulary. Merges are pairs with a space between.
        special: names of roles ("bos_token", ...) and the ids that have them.
        begins, ends: whether a text begins with the bos token, and ends with the eos token.
        spaced: whether a text gets a leading space.
        swallowing: whether special tokens swallow the spaces after them.
        templates: chat templates (Jinja) by the names of their files.
    """

    path: Path
    model: str
    pre: _Pre | None
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    begins: bool
    ends: bool
    spaced: bool
    swallowing: bool
    templates: dict[str, str]

    @classmethod
    def of(cls, metadata: Metadata) -> "GgufTokenizer | None":
        """The tokenizer that the metadata describes, or None.

        Raises:
            ConversionError: its kind is not supported.
        """

        def take(key: str, kind: type, default: Any = None, *, many: bool = False) -> Any:
            return metadata.typed(f"tokenizer.ggml.{key}", kind, default, many=many)

        model, tokens = take("model", str), take("tokens", str, many=True)
        if model is None or not tokens:
            return None
        advice = "give a folder with the model's tokenizer.json by --tokenizer"
        if model not in ("gpt2", "llama"):
            raise metadata.error(
                f"has a tokenizer of kind {model!r:.80}; supported are gpt2 and llama: {advice}"
            )
        name = take("pre", str)
        pre = _PRES.get(name) if model == "gpt2" else None
        if model == "gpt2" and pre is None:
            raise metadata.error(
                f"cuts text by rules named {name!r:.80}, which are unknown here (known: "
                f"{', '.join(_PRES)}): {advice}"
            )
        roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        special = {
            f"{role}_token": i
            for key, role in roles.items()
            if (i := take(f"{key}_token_id", int)) is not None
        }
        if wrong := [role for role, i in special.items() if not 0 <= i < len(tokens)]:
            raise metadata.error(f"has no token for {', '.join(wrong)}: {advice}")
        return cls(
            path=metadata.path,
            model=model,
            pre=pre,
            tokens=tokens,
            kinds=take("token_type", int, many=True) or [1] * len(tokens),
            scores=take("scores", float, many=True) or [0.0] * len(tokens),
            merges=take("merges", str, many=True) or [],
            special=special,
            begins=take("add_bos_token", bool, pre.begins if pre else True),
            ends=take("add_eos_token", bool, False),
            spaced=take("add_space_prefix", bool, True),
            # A rule of Phi 3 that files do not store; llama.cpp knows it by the model's name.
            swallowing=model == "llama" and metadata.take("general.architecture") == "phi3",
            templates=_templates(metadata),
        )

    @property
    def file_names(self) -> tuple[str, ...]:
        return ("tokenizer.json", "tokenizer_config.json", *self.templates)

    @property
    def is_complete(self) -> bool:
        return True

    def write(self, writer: CheckpointWriter) -> str:
        """As `TokenizerSource.write`."""
        try:
            text = self.build().to_str(pretty=True)
        except Exception as error:  # tokenizers raises Exception itself for a wrong vocabulary
            raise ConversionError(
                f"{self.path} has a vocabulary that makes no tokenizer ({error}): give a folder "
                "with the model's tokenizer.json by --tokenizer"
            ) from error
        (writer.folder / "tokenizer.json").write_text(text, encoding="utf-8")
        roles = {role: self.tokens[i] for role, i in self.special.items()}
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
        settings |= {"clean_up_tokenization_spaces": False}
        write_json(writer.folder / "tokenizer_config.json", settings)
        for name, template in self.templates.items():
            path = writer.folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(template, encoding="utf-8")
        return ""

    def build(self) -> Any:
        """The tokenizer as the tokenizers package has it."""
        import tokenizers

        tokenizer = self._bytes() if self.model == "gpt2" else self._pieces()
        tokenizer.add_tokens(
            [
                tokenizers.AddedToken(
                    token,
                    special=kind == _CONTROL,
                    normalized=False,
                    rstrip=self.swallowing and token not in _PLAIN,
                )
                for token, kind in zip(self.tokens, self.kinds, strict=True)
                if kind in (_CONTROL, _USER_DEFINED)
            ]
        )
        self._add_ends(tokenizer)
        return tokenizer

    def _vocabulary(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def _bytes(self) -> Any:
        """Byte-level BPE."""
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        assert self.pre is not None
        pairs = (merge.partition(" ") for merge in self.merges)
        merges = [(left, right) for left, _, right in pairs]
        tokenizer = Tokenizer(
            models.BPE(self._vocabulary(), merges, ignore_merges=self.pre.ignore_merges)
        )
        if self.pre.nfc:
            tokenizer.normalizer = normalizers.NFC()
        cuts: list[Any] = []
        if self.pre.single_digits:
            cuts.append(pre_tokenizers.Digits(individual_digits=True))
        if self.pre.pattern:
            cuts.append(pre_tokenizers.Split(Regex(self.pre.pattern), behavior="isolated"))
        cuts.append(
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.pre.pattern)
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _pieces(self) -> Any:
        """SentencePiece's BPE, with a token for each byte that no piece holds."""
        from tokenizers import Tokenizer, decoders, models, normalizers

        unknown = self.special.get(
            "unk_token", next((i for i, kind in enumerate(self.kinds) if kind == _UNKNOWN), None)
        )
        tokenizer = Tokenizer(
            models.BPE(
                self._vocabulary(),
                self._merges_by_score(),
                unk_token=None if unknown is None else self.tokens[unknown],
                fuse_unk=True,
                byte_fallback=_BYTE in self.kinds,
            )
        )
        prefix = [normalizers.Prepend("▁")] if self.spaced else []
        tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(" ", 1, 0)] if self.spaced else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        return tokenizer

    def _merges_by_score(self) -> list[tuple[str, str]]:
        """The pairs that make up each piece; the piece of the highest score comes first."""
        ids = self._vocabulary()
        merges = []
        for i, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True)):
            if kind in (_UNKNOWN, _CONTROL, _BYTE):
                continue
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in ids and right in ids:
                    merges.append((-self.scores[i], i, ids[left], ids[right]))
        return [(self.tokens[left], self.tokens[right]) for _, _, left, right in sorted(merges)]

    def _add_ends(self, tokenizer: Any) -> None:
        """Adds the tokens that begin and end each text."""
        from tokenizers import processors

        ends = {
            role: self.tokens[self.special[role]]
            for role, wanted in (("bos_token", self.begins), ("eos_token", self.ends))
            if wanted and role in self.special
        }
        if not ends:
            return
        before, after = ends.get("bos_token"), ends.get("eos_token")

        def around(letter: str) -> list[str]:
            return [part for part in (before, letter, after) if part is not None]

        tokenizer.post_processor = processors.TemplateProcessing(
            single=around("$A"),
            pair=[*around("$A:0"), *around("$B:1")],
            special_tokens=[(token, self.special[role]) for role, token in ends.items()],
        )


def _templates(metadata: Metadata) -> dict[str, str]:
    """The chat templates by the names of their files in a HF folder: a default, and named ones."""
    key = "tokenizer.chat_template"
    named = metadata.beginning_with(f"{key}.")
    for name in named:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):  # it becomes the name of a file
            raise metadata.error(f"has a chat template of the name {name!r:.80}, which is none")
    files = {key: "chat_template.jinja"}
    files |= {f"{key}.{name}": TEMPLATES.replace("*", name) for name in named}
    found = {file: metadata.typed(key, str) for key, file in files.items()}
    return {file: template for file, template in found.items() if template}
