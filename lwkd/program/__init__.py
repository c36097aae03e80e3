"""The program ``lwkd``: data, models, training loop and reports around the library."""
