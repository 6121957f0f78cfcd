"""A model that draws grey pictures at once, for tests of what is around a model; give it as a spec's loader."""

from __future__ import annotations

import os
import time

import numpy as np

from quantkit_runtime.server.models.base import BatchModel
from quantkit_runtime.server.protocol import Frames, ModelInfo


class Stub(BatchModel):
    info = ModelInfo(
        kinds=frozenset({"image"}),
        parameters=frozenset({"num_inference_steps"}),
        defaults={"width": 8, "height": 8, "num_inference_steps": 2},
        description="Stub",
    )

    def warm_up(self):
        pass

    def run(self, requests, on_step):
        steps = requests[0].options["num_inference_steps"]
        for step in range(steps):
            time.sleep(0.05)
            on_step(step + 1, steps)
        # The grey tells which process drew it.
        return [
            Frames(np.full((len(one.seeds), one.height, one.width, 3), os.getpid() % 251, np.uint8))
            for one in requests
        ]


def load(_spec):
    return Stub()
