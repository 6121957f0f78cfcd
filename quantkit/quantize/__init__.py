"""Quantizing a model: plan, AutoRound in its own process, staged export, verification, atomic publishing."""
