"""The durable heart: prompt ledger and experience store on SQLite, and the way out to Hugging Face datasets."""
