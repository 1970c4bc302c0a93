"""The operations of the network: torch's names, arguments and meaning, with gradients derived by hand."""
