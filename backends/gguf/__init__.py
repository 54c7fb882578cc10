"""GGUF files for llama.cpp: names and metadata, since llama.cpp owns its graph."""
