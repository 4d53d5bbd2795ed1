"""`KavaTrainer` and the parts that it holds."""
