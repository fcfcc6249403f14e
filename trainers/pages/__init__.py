"""How a report is made: one page, one way to draw, one way to spell intervals and tables."""
