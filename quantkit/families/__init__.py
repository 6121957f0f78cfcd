"""Model families: all that is particular to one kind of model, each in one file."""
