"""Named mods, as a user would write them (see `library`), and the language that mods are written in."""
