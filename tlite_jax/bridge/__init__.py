"""Weights and tokenizers in other projects' formats: Hugging Face directories and GGUF files, in and out."""
