"""The frozen low-rank bridge between the states of two models: at which rank they agree."""
