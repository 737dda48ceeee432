"""Editors: each is a function `edit(model, facts…, settings) -> Edit` that leaves the model as it found it."""
