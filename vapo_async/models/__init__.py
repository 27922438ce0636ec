"""Base models: the embedded one, SmolLM2 and ordinary Hugging Face folders."""
