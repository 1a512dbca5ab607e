"""What the program around us gives. `framework` is Lightning under both its names, and imports it alone.

`loaders` finds train set and targets, `attachment` brings a module to its device and leaves all as it was, `progress`
shows bars, `reports` tells each message once.
"""
