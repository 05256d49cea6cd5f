"""What a finished run can be handed on as, and how such a model is loaded again.

One file per format. `packed` is the format of our own; `linear`, `quantizer` and `registration` are what lets
transformers load it.
"""
