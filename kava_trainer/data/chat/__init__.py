"""Conversations: what a chat template makes of them, where in that each turn is, and what is left out of it."""
