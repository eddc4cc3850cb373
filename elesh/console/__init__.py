"""The console: a web page that shows what runs do, why something was cut, and what is broken.

Three storeys that know only the one below: reading from the bus (:mod:`.runs`, :mod:`.reading`),
view models (:mod:`.overview`, :mod:`.decision`, plain data, no markup), and pages (:mod:`.charts`,
:mod:`.pages`, ``templates/``). :mod:`.app` serves them, :mod:`.report` writes them into one file.
"""

from .app import console_app, serve_console
from .export import write_report

__all__ = ["console_app", "serve_console", "write_report"]
