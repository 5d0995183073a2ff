"""Arms of a third kind, for tests: one of a few lines, and one that leaks later tokens."""

import torch

from tiedlora.adapter.arms import Arm


class BiasArm(Arm):
    """One trained vector, added to the output of the last norm."""

    def __init__(self, model, spec):
        super().__init__(model, spec)
        model.requires_grad_(False)
        self.bias = torch.nn.Parameter(torch.zeros(spec.architecture.hidden))
        self.hook = None
        self.enable()

    def named_parameters(self):
        return {"bias": self.bias}

    def enable(self):
        self.hook = self.hook or self.model.model.norm.register_forward_hook(lambda _m, _i, out: self.changed(out))

    def disable(self):
        self.hook = self.hook and self.hook.remove()

    def changed(self, out):
        return out + self.bias.to(out)

    detach = disable


class MeanArm(BiasArm):
    """As BiasArm, and the vector scales the mean over the whole sequence: each position sees the later ones."""

    def changed(self, out):
        return out + self.bias.to(out) * out.mean(1, keepdim=True)
