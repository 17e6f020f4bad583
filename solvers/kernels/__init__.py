"""Inner loops: ``reference`` in plain torch is the specification of every faster twin."""
