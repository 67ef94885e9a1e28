"""What a job is told: frozen records, read from flags, that check themselves. No TensorFlow here."""
