"""``lwkd distill``: trains a teacher and its students, and shows them side by side."""
