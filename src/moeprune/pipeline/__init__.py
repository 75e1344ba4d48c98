"""The stages in a row; each is one function and one command."""
