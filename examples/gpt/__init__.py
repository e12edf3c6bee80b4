"""A byte-level GPT, cut into pipeline stages: the model, data and training loop of ``train_gpt.py``."""
