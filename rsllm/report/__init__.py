"""Tables, pictures and pages, made of plain results."""
