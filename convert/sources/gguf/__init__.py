"""GGUF files, as llama.cpp writes them: metadata, tensors, and a tokenizer, under HF's names."""
