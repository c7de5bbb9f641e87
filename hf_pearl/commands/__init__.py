"""`python -m hf_pearl COMMAND`: one module per command, and the options that they share."""
