"""Images on their way to the network, one arrow: sources -> prepare -> store -> augment -> module."""
