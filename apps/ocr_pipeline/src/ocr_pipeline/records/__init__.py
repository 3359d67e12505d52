"""The records: what the utility says hangs on each pole, what the photos say, and how they differ."""
