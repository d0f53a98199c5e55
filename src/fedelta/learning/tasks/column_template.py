"""Templates of a configuration that put the cells of a row into a text: names of columns in braces."""

import string


def fields_of(template: str) -> list[str]:
    """Names of the columns in a template.

    Example:
        >>> fields_of("Question: {question}, in {language}")
        ['question', 'language']
    """
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def check_template(template: str) -> str:
    """Return a template if what it has in braces are names.

    Raises:
        ValueError: if it is not valid.
    """
    fields = [(part[1], *part[2:]) for part in string.Formatter().parse(template) if part[1] is not None]
    # A width could ask for gigabytes, and an attribute or index could read more than the column.
    if not all(name.isidentifier() and not spec and not conversion for name, spec, conversion in fields):
        raise ValueError("expected only names of columns in braces, such as {question}; write {{ and }} for braces")
    return template
