"""`nemo-jepo data prepare NAME`: published data sets -> Parquet files that data=jsonl reads, with a manifest."""
