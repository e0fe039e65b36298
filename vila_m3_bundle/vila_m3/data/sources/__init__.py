"""One module per data set; each yields a Record or a Rejected for every row of its source."""
