"""The options of all command lines, their bounds and presets, and the plans derived from them.

A setting declares beside its definition what it may be, and whether it may change on a resume. This folder imports no other.
"""
