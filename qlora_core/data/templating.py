"""Prompts and texts made from columns by a recipe's own Jinja template, in a sandbox.

A recipe may come from someone else, so its template sees plain columns only and cannot reach
Python. A name that no column has is an error, not an empty string.
"""

from collections.abc import Mapping

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qlora_core.data.problems import BadRow
from qlora_core.errors import ConfigError


class RowTemplate:
    """A compiled `dataset.template`.

    Raises:
        ConfigError: It is not valid Jinja.
    """

    def __init__(self, text: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
        )
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError.of(
                [f"dataset.template: {error.message} in line {error.lineno}: {text!r}"], "recipe"
            ) from None

    def render(self, columns: Mapping[str, object]) -> str:
        """Return the text for one row.

        Raises:
            BadRow: The template names a column that the row has not, or fails otherwise.
        """
        try:
            return self._template.render(columns)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise BadRow(
                f"dataset.template fails: {error}; the columns are {', '.join(columns)}"
            ) from None
