"""What a run says of itself: summary, verdict, page, model card, and their way to the hub."""
