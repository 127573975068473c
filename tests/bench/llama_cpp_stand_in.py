"""A stand-in for the package llama-cpp-python, which takes many minutes to install."""

import sys
from types import ModuleType, SimpleNamespace

WEIGHTS = 1000  # bytes


def install(monkeypatch, texts, continuations, *, description=b"llama 1B Q4_K - Medium"):
    """Puts a stand-in in the place of the package.

    Args:
        monkeypatch: pytest's.
        texts: of the tokens of its vocabulary; None is a file without them.
        continuations: prompt as a tuple -> new ids, more than are asked for.
        description: what llama.cpp says about the file.

    Returns:
        The list of calls: ("Llama", file, options), ("reset",), ("generate", ids, temperature), and
        ("draft", ids).
    """
    calls: list[tuple] = []

    class Llama:
        def __init__(self, path, **options):
            if path.endswith("broken.gguf"):
                raise ValueError(f"Failed to load model from file: {path}")
            calls.append(("Llama", path, options))
            self.draft_model, self.model = None, "a pointer"

        def n_vocab(self):
            return len(texts)

        def reset(self):
            calls.append(("reset",))

        def generate(self, ids, *, temp):
            calls.append(("generate", list(ids), temp))
            told = list(ids)
            for token in continuations[tuple(ids)]:
                yield token
                told.append(token)
                if self.draft_model is not None:
                    self.draft_model(told)

    def describe(model, buffer, size):
        buffer.value = description

    class LlamaPromptLookupDecoding:
        def __init__(self, max_ngram_size=2, num_pred_tokens=10):
            self.gamma = num_pred_tokens

        def __call__(self, ids):
            calls.append(("draft", list(ids), self.gamma))

    module, speculative = ModuleType("llama_cpp"), ModuleType("llama_cpp.llama_speculative")
    vars(module).update(
        Llama=Llama,
        __version__="0.3.36",
        LLAMA_VOCAB_TYPE_NONE=0,
        llama_model_desc=describe,
        llama_model_size=lambda model: WEIGHTS,
        llama_model_get_vocab=lambda model: SimpleNamespace(texts=texts),
        llama_vocab_type=lambda vocabulary: 0 if texts[0] is None else 2,
        llama_vocab_get_text=lambda vocabulary, i: vocabulary.texts[i].encode(),
    )
    speculative.LlamaPromptLookupDecoding = LlamaPromptLookupDecoding  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_speculative", speculative)
    return calls
