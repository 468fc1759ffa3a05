"""A template by the name of its module, or made again by the function that made it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import FunctionType
from typing import Any

from scivi.errors import TemplateError, missing_extra
from scivi.extras import extra_of
from scivi.models.template import Template


def reference_of(template: Template) -> str | None:
    """``module:name`` under which an equal template (but for its prior) can be imported; None if none."""
    for name, module in sorted(sys.modules.items()):
        if name == "__main__" or not getattr(module, "__file__", None):
            continue
        for attribute, value in list(vars(module).items()):
            if type(value) is Template and replace(value, prior=template.prior) == template:
                return f"{name}:{attribute}"
    return None


def imported(reference: str) -> tuple[Any, str]:
    """What ``module:name`` names, None if nothing; and in words, the templates that the module has.

    Raises:
        TemplateError: there is no such module, or it needs a package that is not installed.
        Unsupported: that package comes with an extra of scivi.
    """
    module_name, _, name = reference.partition(":")
    if not name:
        raise TemplateError(
            f'"{reference}" is not of the form module:name, such as domains.astrophysics.photons:template.'
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        absent = error.name or str(error)
        if extra := extra_of(absent):
            raise missing_extra(absent, extra) from None
        if f"{module_name}.".startswith(f"{absent}."):  # itself, or a package that it should lie in
            raise TemplateError(f'there is no module "{module_name}"; is its folder on the path?') from None
        raise TemplateError(f'module "{module_name}" needs "{absent}", which is not installed.') from None
    offered = sorted(k for k, v in vars(module).items() if isinstance(v, Template))
    return getattr(module, name, None), str(offered or "none")


def import_template(reference: str) -> Template:
    """The template that ``module:name`` names.

    Raises:
        TemplateError: there is no such module or name; the message lists the templates that the module has.
    """
    found, offered = imported(reference)
    if not isinstance(found, Template):
        module_name, _, name = reference.partition(":")
        raise TemplateError(f'module "{module_name}" has no template "{name}"; it has {offered}.')
    return found


def made_again(maker: str, settings: Mapping[str, Any]) -> Template:
    """The template that the function called ``module:name`` makes with these settings.

    Raises:
        TemplateError: there is no such function, or it makes none with them.
    """
    found, _ = imported(maker)
    try:
        template = found(**settings)
    except TypeError as error:  # it is no function, or its arguments have changed
        raise TemplateError(f'"{maker}" makes no template of {dict(settings)}: {error}.') from None
    if not isinstance(template, Template):
        raise TemplateError(f'"{maker}" makes {type(template).__name__}, not a Template.')
    return template


def is_as_made(template: Template) -> bool:
    """Whether the maker, if there is one, makes a template of the same functions, names and dims."""
    if template.made is None or template.made[0].startswith("__main__:"):
        return False
    parts = ("name", "rows", "dims", "model", "guide", "nets", "simulate", "validate")
    try:
        again = made_again(*template.made)
        return all(_by_name(getattr(again, part)) == _by_name(getattr(template, part)) for part in parts)
    except (ValueError, RuntimeError, LookupError, OSError):  # the maker's; a fit is saved all the same
        return False


def _by_name(part: Any) -> Any:
    """A function, or what ``partial`` makes of one, by its name; anything else as it is."""
    part = part.func if isinstance(part, partial) else part
    return (part.__module__, part.__qualname__) if isinstance(part, FunctionType) else part
