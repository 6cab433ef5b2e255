"""Fits of the constants that ship with quantplan, and the reading of what they are fitted on."""
