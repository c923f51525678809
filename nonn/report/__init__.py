"""Numbers in, tables and figures out. Never imports torch."""
