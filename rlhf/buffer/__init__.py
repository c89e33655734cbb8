"""The durable heart: ledger and store on one SQLite file, seeded row order, offline rows, verification, export."""
