"""A tuning run that is interrupted after its first block, and goes on."""

import pytest

from quantkit.quantize.run import quantize


def interrupted_and_resumed(prepared, output):
    """Interrupt a run once its first block is tuned, run it again, and return what that gave."""

    def interrupt(step):
        if step.stage == "tune" and step.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(prepared, output, on_progress=interrupt)
    result = quantize(prepared, output)
    assert result.tuned.resumed == 1
    return result
