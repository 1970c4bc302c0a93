"""AlexNet (Krizhevsky, Sutskever and Hinton, 2012) with every gradient derived by hand."""

__version__ = "0.1.0"
