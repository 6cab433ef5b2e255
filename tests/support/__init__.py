"""Helpers that several tests share: the real llama.cpp, and small models to feed it."""
