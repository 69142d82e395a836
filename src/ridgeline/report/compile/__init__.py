"""Assets of the page of a compilation."""
