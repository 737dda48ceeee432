"""A result as one HTML file that needs nothing else: to look at, to send, to keep.

    contents.py     what a page shows of a trace, an average, severed curves, a sweep, an edit
    evaluations.py  of an evaluation, or of two side by side
    packing.py      many texts and numbers in few characters
    pages.py        the file: data, style and script in one, under a policy that lets nothing else in
    reading.py      a result from a path, as `mechedit show` finds it

No model is needed. `mechedit view RESULT` is this on the command line, `mechedit.notebook.view` in a notebook.
"""

from mechedit.viewer.contents import Viewable, contents
from mechedit.viewer.pages import ViewError, page, save
from mechedit.viewer.reading import read

__all__ = ["ViewError", "Viewable", "contents", "page", "read", "save"]
