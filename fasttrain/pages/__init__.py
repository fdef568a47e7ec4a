"""The HTML pages: plain data in, one self-contained file out.

A page needs no network and no script. Its charts are SVG lines with HTML labels over them, so that they
follow the reader's light or dark theme and keep their text size on a phone.
"""
