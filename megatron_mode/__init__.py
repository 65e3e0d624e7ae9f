"""Train decoder language models on two modes of text, with a mode logit at every token."""

__version__ = "0.1.0"
