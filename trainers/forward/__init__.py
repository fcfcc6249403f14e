"""How the tokens of a batch travel through a model. Nothing outside this package knows about padding or packing."""
