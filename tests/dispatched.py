"""What torch is asked to do: the kernels of a piece of code, and a ban on waiting for the GPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NO_KERNEL = ("aten.empty", "aten._unsafe_view", "aten._reshape_alias", "profiler.")
WAITS = ("aten._local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal", "aten.nonzero")


class Dispatched(TorchDispatchMode):
    """Lists the names of what runs, views and bare allocations left out.

    waits: False raises AssertionError where a GPU would have to be waited for (a number or a truth
    value of a tensor, a shape that depends on values), which on a CPU nobody notices.
    """

    def __init__(self, waits=True):
        super().__init__()
        self.kernels, self.waits = [], waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert self.waits or not name.startswith(WAITS), f"{name} waits for the GPU"
        if name.startswith("aten.index.") and not self.waits:  # asks how many are true
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask waits"
        if not func.is_view and not name.startswith(NO_KERNEL):
            self.kernels.append(name)
        return func(*args, **(kwargs or {}))
