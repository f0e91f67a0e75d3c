"""The web console: a page, and the one document that it asks for again and again."""
