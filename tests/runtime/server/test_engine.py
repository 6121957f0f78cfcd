"""What the engine tells of memory, with a model and an accelerator that only count."""

from types import SimpleNamespace

import pytest
import serving

from quantkit_runtime.server import engine
from quantkit_runtime.server.engine import Engine
from quantkit_runtime.server.protocol import ChatRequest, Finished, Message, Run, Stop, TextPart


class Accelerator:
    """Holds as many bytes as an answer has words."""

    def __init__(self):
        self.peak = 0

    def is_available(self):
        return True

    def reset_peak_memory_stats(self):
        self.peak = 0

    def max_memory_allocated(self):
        return self.peak


class Chat(serving.FakeChat):
    """Takes memory for what it is asked."""

    def __init__(self, accelerator):
        super().__init__(serving.load_chat(None).info)
        self._accelerator = accelerator

    def admit(self, request):
        super().admit(request)
        self._accelerator.peak = max(self._accelerator.peak, len(request.messages[0].parts[0].text.split()))


class Script:
    """An inbox that has what comes at each look, and keeps what was told."""

    def __init__(self, looks):
        self._looks = looks
        self.told = []

    def drain(self):
        return self._looks.pop(0) if self._looks else []

    def wait(self):
        return next((message for look in iter(self.drain, []) for message in look), Stop())

    def tell(self, event):
        self.told.append(event)


def ask(identity, text):
    return Run((ChatRequest(identity, (Message("user", (TextPart(text),)),), 8),))


@pytest.fixture
def accelerator(monkeypatch):
    found = Accelerator()
    monkeypatch.setattr(engine, "loaded_torch", lambda: SimpleNamespace(accelerator=found))
    monkeypatch.setattr(serving, "STEP_S", 0)
    return found


def test_the_peak_of_chats_is_one_since_the_engine_was_idle(accelerator):
    # The second comes while the first is written, the third after both.
    inbox = Script([[ask("large", "a b c d")], [], [ask("beside", "a")], *[[]] * 4, [ask("small", "a b")]])
    Engine(Chat(accelerator), inbox, ranks=1).serve()
    peaks = {event.id: event.peak_memory_bytes for event in inbox.told if isinstance(event, Finished)}
    assert peaks == {"large": 4, "beside": 4, "small": 2}
