"""Report and poster, made from recorded rows alone. Every number in them can be traced to the line it comes from."""
