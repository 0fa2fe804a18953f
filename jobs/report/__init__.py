"""The report of a run folder: numbers over its rows, and the page that shows them."""
