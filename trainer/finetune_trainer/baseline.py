"""The untuned model asked in several ways: the prompts of each strategy, and which of them did best. Pure."""
