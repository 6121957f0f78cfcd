"""What stands for a CUDA graph on a CPU."""

from torch.utils._pytree import tree_leaves


class RepeatedWork:
    """Does the recorded work again on the tensors that it was recorded with, as a CUDA graph does."""

    made = 0

    def __init__(self):
        type(self).made += 1

    def record(self, work):
        self._work, self._results = work, work()
        for tensor in tree_leaves(self._results):
            tensor.fill_(float("nan"))  # there is nothing in it before the first replay
        return self._results

    def replay(self):
        for place, tensor in zip(tree_leaves(self._results), tree_leaves(self._work()), strict=True):
            place.copy_(tensor)
