"""A model organism: an invented world, all of whose facts are known, and a small transformer that learns it."""
