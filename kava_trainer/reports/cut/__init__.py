"""What a report says of a student that was cut out of its teacher."""
