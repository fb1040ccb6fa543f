"""Registers the operator with torch at import."""

from __future__ import annotations

import torch

from saccade.ops import autograd, gpu, native, schema


def _register() -> torch.library.Library:
    library = torch.library.Library("saccade", "FRAGMENT")
    if native.failure is not None:
        for name, signature in schema.SCHEMAS.items():
            library.define(name + signature)
    for name, fallback, fake, gpu_kernel, autograd_kernel in (
        (
            schema.FORWARD,
            schema.fallback,
            schema.fake,
            gpu.forward,
            autograd.autograd_kernel,
        ),
        (
            schema.BACKWARD,
            schema.backward_fallback,
            schema.backward_fake,
            gpu.backward,
            autograd.backward_autograd_kernel,
        ),
    ):
        library.impl(name, fallback, "CompositeExplicitAutograd")
        library.impl(name, gpu_kernel, "CUDA")
        library.impl(name, autograd_kernel, "Autograd", with_keyset=True)
        # torch.func.vmap would run the kernel once for each entry of the mapped axis.
        library.impl(name, fallback, "FuncTorchBatched")
        torch.library.register_fake(f"saccade::{name}", fake, lib=library)
    return library


# Registrations live as long as this object does.
_library = _register()

OPERATOR, BACKWARD_OPERATOR = schema.get_operators()
