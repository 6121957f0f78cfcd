"""Run the tuning child as usual and write down what BAGEL's second block gets."""

import os
import runpy
from dataclasses import fields

import torch

from quantkit.families import bagel


class Recording(bagel.BagelFamily):
    def text_model(self, model):
        text = super().text_model(model)
        seen = []

        def record(_layer, args, kwargs):
            seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone())
            torch.save(seen, os.environ["BAGEL_RECORD"])

        text.language_model.model.layers[1].register_forward_pre_hook(record, with_kwargs=True)
        return text


bagel.BAGEL = Recording(**{field.name: getattr(bagel.BAGEL, field.name) for field in fields(bagel.BAGEL)})
runpy.run_module("quantkit.quantize.autoround", run_name="__main__", alter_sys=True)
