"""Programs before and after as text, JSON or a page."""
