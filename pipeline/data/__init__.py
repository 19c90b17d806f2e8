"""Feeding the engine: `order` says which sample comes when, `crops` how it is cut, `dali` decodes it."""
