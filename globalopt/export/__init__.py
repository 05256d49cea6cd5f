"""Export finished runs to formats that other programs load, and load them again.

One module per format: `dense`, `adapter`, `factors` and `packed`. `packed` is globalopt's own format; `linear`,
`packing`, `quantizer`, `registration` and `seal` let transformers load it.
"""
