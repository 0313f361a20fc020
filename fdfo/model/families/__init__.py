"""The base models that FDFO trains: one small class a family, picked by the class of pipeline in model_index.json.

base.py is the interface; docs/bases.md says how to add a family. Nothing outside of this folder knows a family's name.
"""
