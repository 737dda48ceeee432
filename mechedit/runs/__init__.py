"""Runs over many facts that survive: what is finished is on disk, whole; what is not is done again."""
