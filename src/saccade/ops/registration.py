"""Registers the operator with torch at import."""

from __future__ import annotations

import torch

from saccade.ops import autograd, gpu, native, schema


def _register() -> torch.library.Library:
    library = torch.library.Library("saccade", "FRAGMENT")
    if native.failure is not None:
        for name, signature in schema.SCHEMAS.items():
            library.define(name + signature)
    for name, fallback, fake, gpu_kernel in (
        (schema.FORWARD, schema.fallback, schema.fake, gpu.forward),
        (schema.BACKWARD, schema.backward_fallback, schema.backward_fake, gpu.backward),
    ):
        library.impl(name, fallback, "CompositeExplicitAutograd")
        library.impl(name, gpu_kernel, "CUDA")
        torch.library.register_fake(f"saccade::{name}", fake, lib=library)
    library.impl(schema.FORWARD, autograd.autograd_kernel, "Autograd", with_keyset=True)
    torch.library.register_autograd(
        f"saccade::{schema.BACKWARD}",
        autograd.backward_of_backward,
        setup_context=autograd.save_for_second_order,
        lib=library,
    )
    return library


# Registrations live as long as this object does.
_library = _register()

OPERATOR, BACKWARD_OPERATOR = schema.get_operators()
