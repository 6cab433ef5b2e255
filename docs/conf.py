"""How Sphinx builds the documentation: ``make docs``."""

from typing import Any

from quantplan import __version__

project = "quantplan"
copyright = "2026, the quantplan developers"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"quantplan {release}"
html_copy_source = False

# Anchors as GitHub makes them, so that links work in both places; and `:::` around directives,
# whose content GitHub then shows as text.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

# What docstrings name in single backticks is an object of the reference, and has to be there.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "exclude-members": "model_config, model_post_init"}
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
# "Attributes:" describes the fields of values; they are not listed a second time one by one.
napoleon_use_ivar = True
# Other projects' types are not looked up: the build needs no network.
_OTHERS = (
    "annotated_types|collections|concurrent|datetime|matplotlib|numpy|os|pathlib|pydantic|"
    "subprocess|types|urllib3"
)
nitpick_ignore_regex = [("py:class", rf"({_OTHERS})\..+")]


def _with_python_defaults(*event: Any) -> tuple[str | None, str | None]:
    """Sphinx cannot read pydantic's ``<factory>``, a default that is made anew each time."""
    signature, returns = event[-2:]
    return signature and signature.replace("<factory>", "..."), returns


def setup(app: Any) -> None:
    """Connects the above."""
    app.connect("autodoc-process-signature", _with_python_defaults)
