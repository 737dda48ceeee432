"""One script a figure, table or benchmark; results land in figures/."""
