"""What only a GPU can prove: `make gpu`, see __main__.py; one file for each kind of step."""
