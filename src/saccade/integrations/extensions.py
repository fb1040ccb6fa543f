"""Installs modules with the names and functions of the compiled modules that other projects import.

Deformable-DETR, mmcv and their relatives import a module that has to be compiled with CUDA. After
`install`, an import of that name finds a module with the same functions on Saccade, for CPUs and GPUs;
downstream code does not change. Importing this file installs nothing.

    python -m saccade.integrations.extensions MultiScaleDeformableAttention -- main.py --epochs 1

runs a script with the modules installed; the script itself does not mention Saccade.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

_ATTENTION = "saccade.integrations.ms_deform_extensions"
_CONVOLUTION = "saccade.integrations.dcn_extensions"


class _Extension(NamedTuple):
    """One compiled module."""

    functions: dict[str, tuple[str, str]]
    """For each function the file that defines it, and its name there."""
    downstream: tuple[str, ...] = ()
    """Files that import the module, work without it if that fails, and do not try again."""
    version: str | None = None
    """Version of the distribution, for modules whose downstream code looks it up."""
    others_as_stubs: bool = False
    """Whether other names are stubs: downstream code refuses a module without functions it never calls."""


def _in(file: str, *names: str) -> dict[str, tuple[str, str]]:
    return {name: (file, name) for name in names}


_MS_DEFORM = _in(_ATTENTION, "ms_deform_attn_forward", "ms_deform_attn_backward")
_DCNV3 = _in(_CONVOLUTION, "dcnv3_forward", "dcnv3_backward")
_DCNV4 = _in(
    _CONVOLUTION,
    "dcnv4_forward",
    "dcnv4_backward",
    "flash_deform_attn_forward",
    "flash_deform_attn_backward",
)
_EXTENSIONS = {
    "MultiScaleDeformableAttention": _Extension(_MS_DEFORM),
    "mmcv._ext": _Extension(
        {
            "ms_deform_attn_forward": (_ATTENTION, "ms_deform_attn_forward"),
            "ms_deform_attn_backward": (_ATTENTION, "mmcv_ms_deform_attn_backward"),
            **_in(_ATTENTION, "get_compiler_version", "get_compiling_cuda_version"),
        },
        others_as_stubs=True,
    ),
    "groundingdino._C": _Extension(
        _MS_DEFORM, downstream=("groundingdino.models.GroundingDINO.ms_deform_attn",)
    ),
    "detrex._C": _Extension(
        _MS_DEFORM | _DCNV3,
        downstream=("detrex.layers.multi_scale_deform_attn", "detrex.layers.dcn_v3"),
    ),
    "DCNv4.ext": _Extension(_DCNV4),
    # From 1.1 on, InternImage passes remove_center in every call.
    "DCNv3": _Extension(_DCNV3, version="1.1"),
}


class ExtensionReport(NamedTuple):
    """What `install` did. A module that cannot be installed is an error."""

    installed: dict[str, tuple[str, ...]]
    """The functions of each requested module."""
    hidden: dict[str, str]
    """Files of compiled modules that are installed too; an import finds Saccade's module first."""


def install(*names: str) -> ExtensionReport:
    """Makes modules importable under the names of compiled ones, before downstream code imports them.

    A second call changes nothing. All names are checked before the first is installed.

    Args:
        *names: of "MultiScaleDeformableAttention" (Deformable-DETR, DINO, Mask2Former and most of
            the family), "mmcv._ext", "groundingdino._C", "detrex._C", "DCNv4.ext" and "DCNv3"
            (InternImage).

    Returns:
        ExtensionReport: the functions of each module, and the compiled modules that they hide.

    Raises:
        ValueError: no name, or an unknown one; the message lists the known names.
        RuntimeError: the call comes too late: a compiled module of that name is imported, and the code
            that imported it holds its functions; or downstream code was imported without its module.

    Example:
        >>> from saccade.integrations import extensions
        >>> extensions.install("MultiScaleDeformableAttention").installed
        {'MultiScaleDeformableAttention': ('ms_deform_attn_forward', 'ms_deform_attn_backward')}
        >>> from MultiScaleDeformableAttention import ms_deform_attn_forward
        >>> extensions.uninstall("MultiScaleDeformableAttention")
        ['MultiScaleDeformableAttention']
    """
    if not names:
        raise ValueError(f"names: expected at least one of {', '.join(_EXTENSIONS)}, got none")
    for name in names:
        _check_name(name)
        _check_not_too_late(name)
    hidden = {name: file for name in names if (file := _find_compiled(name))}
    for name in names:
        _finder.modules.setdefault(name, _modules.setdefault(name, _Module(name)))
        _register_version(name)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    return ExtensionReport({name: (*_EXTENSIONS[name].functions,) for name in names}, hidden)


def uninstall(*names: str) -> list[str]:
    """Undoes `install`: an import finds again what it found before.

    Downstream code that has imported a module keeps it.

    Args:
        *names: as for `install`; without names, all that are installed.

    Returns:
        The names that were installed.

    Raises:
        ValueError: a name is unknown.
    """
    for name in names:
        _check_name(name)
    installed = [name for name in names or (*_finder.modules,) if name in _finder.modules]
    for name in installed:
        module = _finder.modules.pop(name)
        if sys.modules.get(name) is module:
            del sys.modules[name]
        package, _, attribute = name.rpartition(".")
        if getattr(sys.modules.get(package), attribute, None) is module:
            delattr(sys.modules[package], attribute)
        _unregister_version(name)
    if not _finder.modules and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    return installed


class _Module(ModuleType):
    """Stands for a compiled module. A function is imported when it is used, so that one project does not
    import what only another needs.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        extension = _EXTENSIONS[self.__name__]
        if name in extension.functions:
            file, function = extension.functions[name]
            value: Callable[..., Any] = getattr(importlib.import_module(file), function)
        elif extension.others_as_stubs and not name.startswith("_"):
            value = _make_stub(self.__name__, name)
        else:
            raise AttributeError(
                f"{self.__name__}: expected one of {', '.join(extension.functions)}, which Saccade "
                f"provides, got {name!r}"
            )
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *_EXTENSIONS[self.__name__].functions})


def _make_stub(module: str, name: str) -> Callable[..., NoReturn]:
    """A function that passes tests for its existence, and raises when it is called."""

    def stub(*_: Any, **__: Any) -> NoReturn:
        provided = ", ".join(_EXTENSIONS[module].functions)
        raise NotImplementedError(
            f"{module}.{name}: Saccade provides {provided} only; "
            f"everything else of {module} needs the compiled module"
        )

    stub.__name__ = stub.__qualname__ = name
    return stub


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the installed modules, before all other finders.

    Modules in `sys.modules` would suffice for most imports; with a finder the import system also gives
    them a spec and makes them attributes of their package.
    """

    def __init__(self) -> None:
        self.modules: dict[str, _Module] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.modules:
            return None
        return importlib.machinery.ModuleSpec(name, self, origin="saccade")

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return self.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing: `create_module` returns a complete module."""


_finder = _Finder()
# One module per name for the whole process: a second `install` gives the module that downstream code holds.
_modules: dict[str, _Module] = {}


def _check_name(name: str) -> None:
    # Compared with a tuple, because looking up a list in the dict would raise a TypeError.
    if name not in (*_EXTENSIONS,):
        raise ValueError(f"names: expected some of {', '.join(_EXTENSIONS)}, got {name!r}")


def _check_not_too_late(name: str) -> None:
    """Raises a RuntimeError if downstream code holds another module of this name, or works without one."""
    ours = _modules.get(name)
    imported = sys.modules.get(name)
    if imported is not None and imported is not ours:
        raise RuntimeError(
            f"{name}: expected a module that is not imported yet, got {imported!r}; code that imported "
            "it holds its functions. Call install before, in a new process"
        )
    for file in _EXTENSIONS[name].downstream:
        module = getattr(sys.modules.get(file), name.rpartition(".")[2], None)
        if file in sys.modules and (module is None or module is not ours):
            raise RuntimeError(
                f"{name}: expected {file} not to be imported yet; it goes on without {name} and does "
                "not try again. Call install before, in a new process"
            )


def _find_compiled(name: str) -> str | None:
    """The file of a compiled module of this name, if one is installed; nothing is imported."""
    package = name.rpartition(".")[0]
    find = importlib.machinery.PathFinder.find_spec
    path = getattr(sys.modules.get(package), "__path__", None)
    if package and path is None:
        spec = find(package)
        path = spec.submodule_search_locations if spec else None
        if path is None:
            return None
    spec = find(name, path)
    # A folder of that name, somewhere on the path, has a spec without an origin.
    return spec.origin if spec else None


def _get_working_set(name: str) -> Any:
    """The distributions that pkg_resources knows; None unless a project looks up the version of `name` there.

    InternImage is the only project that does. Newer setuptools do not have pkg_resources: then
    InternImage cannot be imported.
    """
    if _EXTENSIONS[name].version is None or importlib.util.find_spec("pkg_resources") is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resources: Any = importlib.import_module("pkg_resources")
    return resources.working_set


def _register_version(name: str) -> None:
    """Gives the distribution of this name a version."""
    working_set, key = _get_working_set(name), name.lower()
    if working_set is not None and key not in working_set.by_key:
        resources: Any = importlib.import_module("pkg_resources")
        version = _EXTENSIONS[name].version
        _distributions[name] = resources.Distribution(project_name=name, version=version)
        working_set.by_key[key] = _distributions[name]


def _unregister_version(name: str) -> None:
    """Undoes `_register_version`."""
    working_set, key = _get_working_set(name), name.lower()
    if working_set is not None and working_set.by_key.get(key) is _distributions.get(name):
        working_set.by_key.pop(key, None)


_distributions: dict[str, Any] = {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a script, or a module after `-m`, with modules installed: `NAME... -- SCRIPT ARGUMENT...`."""
    parser = argparse.ArgumentParser(
        "python -m saccade.integrations.extensions",
        "%(prog)s NAME... -- SCRIPT.py [ARGUMENT...]\n       %(prog)s NAME... -- -m MODULE [ARGUMENT...]",
        epilog=f"NAME is one of {', '.join(_EXTENSIONS)}.",
    )
    parser.add_argument("names", nargs="+", metavar="NAME")
    arguments = [*(sys.argv[1:] if arguments is None else arguments)]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    names, command = parser.parse_args(arguments[:end]).names, arguments[end + 1 :]
    as_module = command[:1] == ["-m"]
    command = command[as_module:]
    if not command:
        parser.error("expected a script, or -m and a module, behind --")
    try:
        install(*names)
    except ValueError as error:
        parser.error(str(error))
    sys.argv = command
    # Python sets the first entry to the script's folder likewise; so far it is the current folder.
    if not getattr(sys.flags, "safe_path", False) and not as_module:
        sys.path[0] = os.path.dirname(os.path.abspath(command[0]))
    if as_module:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    # Runs the module that other code imports; this copy of it is called __main__.
    importlib.import_module("saccade.integrations.extensions").main()
