"""The compiled modules that other projects import, under the same names, computed by Saccade.

Deformable-DETR, mmcv and their relatives import a module that has to be compiled with CUDA. After
`install`, an import of that name finds a module with the same functions, on the CPU and on a GPU, and
nothing downstream changes. Importing this file installs nothing.

    python -m saccade.integrations.extensions MultiScaleDeformableAttention -- main.py --epochs 1

runs a script that knows nothing of Saccade with the modules installed.
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
    """What is known of one compiled module."""

    functions: dict[str, tuple[str, str]]
    """The file that has each, and its name there."""
    downstream: tuple[str, ...] = ()
    """The files that import it, go on without it if that fails, and do not try again."""
    version: str | None = None
    """Where downstream code asks the installed distribution for it."""
    others_as_stubs: bool = False
    """Downstream code refuses a module that lacks functions, even those that it never calls."""


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
    """What `install` did. Nothing is left out in silence: what cannot be installed is an error."""

    installed: dict[str, tuple[str, ...]]
    """The functions of each module that was asked for."""
    hidden: dict[str, str]
    """The files of compiled modules that are installed too: an import finds Saccade's before them."""


def install(*names: str) -> ExtensionReport:
    """Makes modules importable under the names of compiled ones, before downstream code imports them.

    Doing it twice changes nothing. All names are checked before the first is installed.

    Args:
        *names: of "MultiScaleDeformableAttention" (Deformable-DETR, DINO, Mask2Former and most of
            the family), "mmcv._ext", "groundingdino._C", "detrex._C", "DCNv4.ext" and "DCNv3"
            (InternImage).

    Returns:
        ExtensionReport: the functions of each module, and the compiled modules that they hide.

    Raises:
        ValueError: no name, or one that is not known; the message lists those that are.
        RuntimeError: it is too late: a compiled module of that name is imported, and whoever imported it
            holds its functions; or downstream code was imported that goes on without its module.

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
        _check_time(name)
    hidden = {name: file for name in names if (file := _file_of_compiled(name))}
    for name in names:
        _finder.modules.setdefault(name, _modules.setdefault(name, _Module(name)))
        _announce(name)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    return ExtensionReport({name: (*_EXTENSIONS[name].functions,) for name in names}, hidden)


def uninstall(*names: str) -> list[str]:
    """Undoes `install`: an import finds again what it found before.

    Downstream code that has imported a module keeps it.

    Args:
        *names: as for `install`; none of them means all that are installed.

    Returns:
        The names that were installed.

    Raises:
        ValueError: a name is not known.
    """
    for name in names:
        _check_name(name)
    found = [name for name in names or (*_finder.modules,) if name in _finder.modules]
    for name in found:
        module = _finder.modules.pop(name)
        if sys.modules.get(name) is module:
            del sys.modules[name]
        package, _, attribute = name.rpartition(".")
        if getattr(sys.modules.get(package), attribute, None) is module:
            delattr(sys.modules[package], attribute)
        _announce(name, withdraw=True)
    if not _finder.modules and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    return found


class _Module(ModuleType):
    """Stands for a compiled module. Its functions are looked up when they are asked for: those of
    one project do not bring along what another needs.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        extension = _EXTENSIONS[self.__name__]
        if name in extension.functions:
            file, function = extension.functions[name]
            found: Callable[..., Any] = getattr(importlib.import_module(file), function)
        elif extension.others_as_stubs and not name.startswith("_"):
            found = _stub(self.__name__, name)
        else:
            raise AttributeError(
                f"{self.__name__}: expected one of {', '.join(extension.functions)}, which Saccade "
                f"provides, got {name!r}"
            )
        setattr(self, name, found)
        return found

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *_EXTENSIONS[self.__name__].functions})


def _stub(module: str, name: str) -> Callable[..., NoReturn]:
    """There for whoever asks whether it is there; who calls it learns that it is not."""

    def stub(*_: Any, **__: Any) -> NoReturn:
        provided = ", ".join(_EXTENSIONS[module].functions)
        raise NotImplementedError(
            f"{module}.{name}: Saccade provides {provided} only; "
            f"everything else of {module} needs the compiled module"
        )

    stub.__name__ = stub.__qualname__ = name
    return stub


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the installed modules, before everybody else.

    Modules put into `sys.modules` would do for most imports; the import system gives these a spec and
    their place in the package too.
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
        """Nothing is left to do."""


_finder = _Finder()
# Of each name one for good: downstream code that holds it and a second `install` mean the same.
_modules: dict[str, _Module] = {}


def _check_name(name: str) -> None:
    # A tuple: of a list, a dict would complain that it has no hash.
    if name not in (*_EXTENSIONS,):
        raise ValueError(f"names: expected some of {', '.join(_EXTENSIONS)}, got {name!r}")


def _check_time(name: str) -> None:
    """A RuntimeError if somebody holds another module of this name, or went on without one."""
    ours = _modules.get(name)
    imported = sys.modules.get(name)
    if imported is not None and imported is not ours:
        raise RuntimeError(
            f"{name}: expected a module that is not imported yet, got {imported!r}; whoever imported "
            "it holds its functions. Call install before, in a new process"
        )
    for file in _EXTENSIONS[name].downstream:
        held = getattr(sys.modules.get(file), name.rpartition(".")[2], None)
        if file in sys.modules and (held is None or held is not ours):
            raise RuntimeError(
                f"{name}: expected {file} not to be imported yet; it goes on without {name} and does "
                "not try again. Call install before, in a new process"
            )


def _file_of_compiled(name: str) -> str | None:
    """Where a module of this name is installed, found without importing anything."""
    package = name.rpartition(".")[0]
    find = importlib.machinery.PathFinder.find_spec
    path = getattr(sys.modules.get(package), "__path__", None)
    if package and path is None:
        spec = find(package)
        path = spec.submodule_search_locations if spec else None
        if path is None:
            return None
    found = find(name, path)
    # A folder of that name, somewhere on the path, has no origin.
    return found.origin if found else None


def _announce(name: str, *, withdraw: bool = False) -> None:
    """Gives the distribution of this name a version, or takes it back.

    InternImage asks pkg_resources for it, and nobody else. Newer setuptools come without: there it
    cannot be imported, whatever is done here.
    """
    version = _EXTENSIONS[name].version
    if version is None or importlib.util.find_spec("pkg_resources") is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resources: Any = importlib.import_module("pkg_resources")
    known, key = resources.working_set, name.lower()
    if withdraw:
        if known.by_key.get(key) is _distributions.get(name):
            known.by_key.pop(key, None)
    elif key not in known.by_key:
        _distributions[name] = resources.Distribution(project_name=name, version=version)
        known.by_key[key] = _distributions[name]


_distributions: dict[str, Any] = {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a script, or a module after `-m`, with modules installed: `NAME... -- SCRIPT ARGUMENT...`."""
    parser = argparse.ArgumentParser(
        "python -m saccade.integrations.extensions",
        "%(prog)s NAME... -- SCRIPT.py [ARGUMENT...]\n       %(prog)s NAME... -- -m MODULE [ARGUMENT...]",
        epilog=f"NAME is one of {', '.join(_EXTENSIONS)}.",
    )
    parser.add_argument("names", nargs="+", metavar="NAME")
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    at = given.index("--") if "--" in given else len(given)
    names, command = parser.parse_args(given[:at]).names, given[at + 1 :]
    as_module = command[:1] == ["-m"]
    command = command[as_module:]
    if not command:
        parser.error("expected a script, or -m and a module, behind --")
    try:
        install(*names)
    except ValueError as error:
        parser.error(str(error))
    sys.argv = command
    # As Python does, which has put there the folder that it was started in.
    if not getattr(sys.flags, "safe_path", False) and not as_module:
        sys.path[0] = os.path.dirname(os.path.abspath(command[0]))
    if as_module:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    # Not this copy of the file, which is called __main__: the one that others import.
    importlib.import_module("saccade.integrations.extensions").main()
