"""A model organism: an invented world, all of whose facts are known, and a small transformer that learns it.

The trained models ship with mechedit as folders in Hugging Face's format; `models.load("organism")` takes them by name.
"""

from mechedit.shipped import MODELS, folder

__all__ = ["MODELS", "folder"]
