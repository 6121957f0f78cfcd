"""Kinds of models that the engine serves."""
