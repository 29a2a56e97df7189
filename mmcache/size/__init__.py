"""What a model's config says about the bytes a cache will hold: KV a token, embeddings an item, latents a picture.

Arithmetic on a config.json alone, without the model, torch or transformers. PURE: no clock, no randomness, no I/O.
"""
