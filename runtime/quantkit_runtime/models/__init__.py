"""What single models need: architectures that neither diffusers nor transformers has, and mends of theirs."""
