"""Models of which each rank holds shards (FSDP2, tensor parallel): grown where they are."""
