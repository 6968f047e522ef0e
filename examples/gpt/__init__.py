"""A small GPT that is trained on English text and grown while it learns."""
