"""The user's modules, read and never changed: names, layouts, hooks, inputs, and passes without side effects."""
