"""Other people's measurements, and their steps as they ran them: what validates the prices."""
