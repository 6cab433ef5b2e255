"""Asks a local llama.cpp what it allocates."""
