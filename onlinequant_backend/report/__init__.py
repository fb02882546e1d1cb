"""What was decided for every layer and why: as data, as a table, as a picture."""
