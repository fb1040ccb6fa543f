"""Registers the operators with torch, all at import."""

from __future__ import annotations

import torch

from saccade.ops import flops, gpu, native
from saccade.ops.contract import FUSED, PLAIN
from saccade.ops.gradients import autograd_kernel, backward_of_backward, save_for_second_order


def _register() -> torch.library.Library:
    library = torch.library.Library("saccade", "FRAGMENT")
    for operator in (PLAIN, FUSED):
        if native.failure is not None:
            for name, schema in operator.schemas.items():
                library.define(name + schema)
        for name, fallback, fake in (
            (operator.name, operator.fallback, operator.fake),
            (operator.backward_name, operator.backward_fallback, operator.backward_fake),
        ):
            library.impl(name, fallback, "CompositeExplicitAutograd")
            torch.library.register_fake(f"saccade::{name}", fake, lib=library)
        for name, kernel in gpu.kernels(operator).items():
            library.impl(name, kernel, "CUDA")
        library.impl(operator.name, autograd_kernel(operator), "Autograd", with_keyset=True)
        torch.library.register_autograd(
            f"saccade::{operator.backward_name}",
            backward_of_backward(operator),
            setup_context=save_for_second_order(operator),
            lib=library,
        )
    return library


# Registrations live as long as this object does.
_library = _register()
flops.register_with_counter()

# The overloads themselves: looking one up costs as much as a small kernel.
PLAIN_OPERATOR = torch.ops.saccade.deformable_attention.default
FUSED_OPERATOR = torch.ops.saccade.fused_deformable_attention.default
