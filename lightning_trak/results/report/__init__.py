"""The report: an attribution as one HTML file that anyone can open, and its small form in notebooks.

What an attribution knows, and data sets, come in; a file goes out. In the order of the data: `content` collects what is
shown, `drawing` draws examples for what they are, `trust` says how far scores can be relied on, `page` fills
`templates/report.html`, which has the sections.
May import of `results` what `attribution` builds on, and not `attribution` itself.
"""
