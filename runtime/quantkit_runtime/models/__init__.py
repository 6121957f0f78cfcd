"""Architectures that neither diffusers nor transformers has, one file each."""
