"""From the name of a data set to the batches of an optimizer step."""
