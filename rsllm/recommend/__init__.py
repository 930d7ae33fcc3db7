"""From a trained model to what a user should get: `load`, `Ranker`, and lists for all users."""
