"""Data: what a template needs of a table, and every kind of table that we read."""
