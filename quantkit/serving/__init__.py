"""Serving with engines other than quantkit's own runtime."""
